"""``python -m tllib_rs.run`` against ``python`` itself."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

import tllib_rs

STANDIN = pathlib.Path(__file__).parent / "standin"
PACKAGE = pathlib.Path(tllib_rs.__file__).parent.parent

SCRIPT = """\
import sys
import __main__

def show(value):
    return repr(value).partition(" at 0x")[0]

print({name: show(value) for name, value in sorted(vars(__main__).items())})
print(sys.argv, sys.path[:2], __name__, __file__)


class Boom(Exception):
    pass


def fail():
    raise Boom("on purpose")


if __name__ == "__main__":
    if sys.argv[-1] == "error":
        fail()
    if sys.argv[-1] == "chained":
        try:
            fail()
        except Boom:
            {}["missing"]
    if sys.argv[-1] == "hook":
        sys.excepthook = lambda kind, error, trace: print(kind, trace.tb_frame.f_code.co_name)
        fail()
    if sys.argv[-1] == "exit":
        sys.exit("bye")
    if sys.argv[-1] == "interrupt":
        raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "link.py").symlink_to("sub/linked.py")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "linked.py").write_text(SCRIPT)
    (tmp_path / "syntax.py").write_text("x = 1\ndef (\n")
    for name in ("program", "package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").write_text(SCRIPT)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SCRIPT)
    return tmp_path


def _python(folder, *arguments):
    paths = os.pathsep.join(map(str, (PACKAGE, STANDIN)))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "command",
    [
        "script.py --flag -m value",
        "script.py chained",
        "script.py hook",
        "script.py exit",
        "script.py interrupt",
        "link.py",
        "syntax.py",
        "missing.py",
        "-m script error",
        "-m package one",
        "-m missing",
        "program error",
        "archive.zip two",
    ],
)
def test_as_python_does(folder, command):
    plain = _python(folder, *command.split())
    ours = _python(folder, "-m", "tllib_rs.run", *command.split())
    assert ours.returncode == plain.returncode
    assert ours.stdout == plain.stdout
    assert ours.stderr == plain.stderr


def test_usage(folder):
    done = _python(folder, "-m", "tllib_rs.run")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tllib_rs.run")


TRAINING = """\
import torch
from tllib.modules.grl import WarmStartGradientReverseLayer
from tllib.self_training.mcc import MinimumClassConfusionLoss, ImageClassifier
from tllib.vision.models.reid.loss import SoftTripletLoss
from tllib.utils.meter import Meter

if __name__ == "__main__":
    assert MinimumClassConfusionLoss.__module__ == "tllib_rs.self_training.mcc", MinimumClassConfusionLoss
    z = WarmStartGradientReverseLayer()(torch.randn(4, 3, requires_grad=True))
    meter = Meter()
    meter.update(MinimumClassConfusionLoss(2.0)(z).item())
    print(round(meter.mean, 3) > 0)
    from tllib.vision import models
"""


def test_a_script_gets_past_the_lines_that_we_provide(folder):
    (folder / "train.py").write_text(TRAINING)
    plain, ours = _python(folder, "train.py"), _python(folder, "-m", "tllib_rs.run", "train.py")
    assert "cannot import name 'model_urls'" in plain.stderr
    assert plain.stdout == ""
    assert ours.stdout == "True\n"
    # The last line imports what we do not provide: tllib's own error, and no frame of ours.
    assert ours.stderr.endswith(plain.stderr[plain.stderr.index("ImportError: cannot import name") :])
    # The folder of the project may well be named like the package.
    assert str(PACKAGE / "tllib_rs") not in ours.stderr
    assert f'train.py", line {len(TRAINING.splitlines())}, in <module>' in ours.stderr


SPAWN = """\
import multiprocessing

from tllib.self_training.mcc import MinimumClassConfusionLoss

def work(queue):
    queue.put(MinimumClassConfusionLoss.__module__)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get(timeout=120))
    process.join()
"""


def test_processes_that_start_afresh_are_patched_too(folder):
    (folder / "spawn.py").write_text(SPAWN)
    done = _python(folder, "-m", "tllib_rs.run", "spawn.py")
    assert done.stdout == "tllib_rs.self_training.mcc\n", done.stderr
