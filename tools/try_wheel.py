"""Install a wheel beside torch in fresh environments of the oldest and the newest Python at hand (of all, if
TLLIB_RS_ALL_PYTHONS is 1), and train a step with it.

python tools/try_wheel.py dist/tllib_rs-*.whl
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

STEP = """
import sys, torch, tllib_rs
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
logits = torch.randn(32, 31, requires_grad=True)
MinimumClassConfusionLoss(2.0)(logits).backward()
assert logits.grad.isfinite().all()
print(f"  python {sys.version.split()[0]}, torch {torch.__version__}, tllib_rs {tllib_rs.__version__}: ok")
"""


def interpreters() -> dict[str, str]:
    """The Pythons from 3.10 on that really run, by minor version."""
    found = {}
    roots = sorted(pathlib.Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    names = [shutil.which(f"python3.{minor}") for minor in range(10, 14)]
    for path in [sys.executable, *map(str, roots), *filter(None, names)]:
        code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
        run = subprocess.run([path, "-c", code], capture_output=True, text=True)
        version = run.stdout.strip()
        if run.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 10):
            found.setdefault(version, path)
    return found


def main(wheel: str) -> int:
    """Try the wheel with two Pythons, or with all under TLLIB_RS_ALL_PYTHONS=1."""
    pythons = sorted(interpreters().items(), key=lambda item: int(item[0].split(".")[1]))
    if not os.environ.get("TLLIB_RS_ALL_PYTHONS"):
        pythons = [pythons[0], pythons[-1]] if len(pythons) > 1 else pythons
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "LIBTORCH_USE_PYTORCH")
    }
    for version, python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            print(f"python {version}: {python}", flush=True)
            subprocess.run([python, "-m", "venv", folder], check=True, env=clean)
            inside = str(pathlib.Path(folder, "bin", "python"))
            subprocess.run([inside, "-m", "pip", "install", "--quiet", wheel], check=True, env=clean)
            subprocess.run([inside, "-c", STEP], check=True, env=clean, cwd=folder)
    print(f"{len(pythons)} Pythons, one wheel")
    return len(pythons) < 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
