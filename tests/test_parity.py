"""The live comparison itself, against the stand-in of tests/standin."""

import os
import pathlib
import subprocess
import sys

import pytest

import tllib_rs

ROOT = pathlib.Path(__file__).parent.parent


def _parity(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TLLIB_DIR"}
    environment["PYTHONPATH"] = str(pathlib.Path(tllib_rs.__file__).parent.parent)
    if folder is not None:
        environment["TLLIB_DIR"] = str(folder)
    return subprocess.run(
        [sys.executable, ROOT / "tools/parity.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_everything_agrees_with_the_stand_in():
    done = _parity(ROOT / "tests/standin")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].split() == [lines[-1].split()[0], "of", lines[-1].split()[0], "agree"]
    assert sum("20 steps of" in line for line in lines) == 11


def test_a_difference_is_found(tmp_path):
    """A tllib that scales differently fails the comparison, both of values and of trainings."""
    for file in (ROOT / "tests/standin/tllib").rglob("*.py"):
        target = tmp_path / file.relative_to(ROOT / "tests/standin")
        target.parent.mkdir(parents=True, exist_ok=True)
        source = file.read_text()
        if file.name == "mcc.py":
            assert "/ logits.shape[1]" in source
            source = source.replace("/ logits.shape[1]", "/ (1.01 * logits.shape[1])")
        target.write_text(source)
    done = _parity(tmp_path)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert any(" mcc " in line for line in failed)
    assert any("20 steps of mcc" in line for line in failed)


def test_without_tllib_one_line_says_so():
    if subprocess.run([sys.executable, "-c", "import tllib"], capture_output=True).returncode == 0:
        pytest.skip("tllib is installed")
    done = _parity(None)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("parity: no tllib here")


def test_a_folder_without_tllib_is_an_error(tmp_path):
    done = _parity(tmp_path)
    assert done.returncode == 1
    assert "holds no tllib/self_training" in done.stderr
