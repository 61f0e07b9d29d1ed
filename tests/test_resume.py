"""A run that is stopped, at whatever moment, continues as if it had not been."""

import collections
import json
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tllib_rs import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("digits_flexmatch.csv", "digits_flexmatch.txt", "digits_flexmatch.png")
IN_A_SAVE = {"write", "fsync", "replace", "replaced"}


def run(*command, cwd):
    """What the command prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"MPLCONFIGDIR": str(cwd / "matplotlib")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path):
    for module in ("sklearn", "matplotlib", "tqdm", "tabulate"):
        pytest.importorskip(module)
    stops = json.loads(run(ROOT / "tests" / "killed.py", tmp_path, cwd=tmp_path))
    kinds = collections.Counter(kind for _, _, kind in stops["events"])
    assert kinds.total() == 20
    assert kinds.keys() >= IN_A_SAVE | {"step", "between optimizer and teacher"}
    assert stops["moments"]
    losses = (tmp_path / "peace" / FILES[0]).read_text().splitlines()
    assert len(losses) == 1 + 2 * 31
    assert len(set(losses)) == len(losses)
    for how in ("events", "moments"):
        for name in FILES:
            peace, killed = tmp_path / "peace" / name, tmp_path / how / name
            assert killed.read_bytes() == peace.read_bytes(), f"{name} after stops at {stops[how]}"


def test_an_example_refuses_a_checkpoint_of_other_settings(tmp_path):
    pytest.importorskip("sklearn")
    saved = {"settings": {"seeds": [1]}, "finished": [], "current": None}
    checkpoint.save(saved, tmp_path / "demo" / "digits_flexmatch.pt")
    command = [sys.executable, ROOT / "examples" / "digits_flexmatch.py", "--quick", "--resume"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "digits_flexmatch.pt is of a run with other settings: {'seeds': [1]}, now" in done.stderr
    assert "Traceback" not in done.stderr


def test_save_makes_folders_and_load_reads(tmp_path):
    path = tmp_path / "a" / "b" / "last.pt"
    layer = torch.nn.Linear(3, 2)
    checkpoint.save({"model": layer.state_dict(), "step": 3}, path)
    loaded = checkpoint.load(str(path))
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["weight"], layer.weight)
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")


def test_load_runs_no_code_of_the_file(tmp_path):
    checkpoint.save({"fraction": pathlib.PurePosixPath("x")}, tmp_path / "last.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path / "last.pt")


class Unpicklable:
    """Fails in the middle of a save."""

    def __reduce__(self):
        raise OSError("disk full")


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 2, "x": Unpicklable()}, path)
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


KILLED_IN_A_SAVE = """
import os, signal, sys, torch
from tllib_rs import checkpoint
os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save({"step": 2, "x": torch.zeros(1000)}, sys.argv[1])
"""


def test_a_kill_in_a_save_leaves_the_old_file_and_the_next_save_cleans_up(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_SAVE, path], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.load(path) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "last.pt.part"]
    checkpoint.save({"step": 3}, path)
    assert checkpoint.load(path) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def draw():
    """Numbers of all three generators; numpy and Python hold back one of each pair of normal numbers."""
    # The legacy functions are the ones whose state is global.
    return torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()  # noqa: NPY002


def test_random_numbers_go_on_through_a_file(tmp_path):
    draw()
    checkpoint.save(checkpoint.random_states(), tmp_path / "random.pt")
    expected = [draw() for _ in range(3)]
    checkpoint.set_random_states(checkpoint.load(tmp_path / "random.pt"))
    assert [draw() for _ in range(3)] == expected
    with pytest.raises(KeyError):
        checkpoint.set_random_states({})


def test_states_of_generators_go_through_a_file(tmp_path):
    """What the docstring says about generators of one's own."""
    own, rng = torch.Generator().manual_seed(3), np.random.default_rng(3)
    states = {"own": own.get_state(), "rng": rng.bit_generator.state}
    checkpoint.save(states, tmp_path / "random.pt")
    expected = torch.rand(3, generator=own).tolist(), rng.random(3).tolist()
    loaded = checkpoint.load(tmp_path / "random.pt")
    own.set_state(loaded["own"])
    rng.bit_generator.state = loaded["rng"]
    assert (torch.rand(3, generator=own).tolist(), rng.random(3).tolist()) == expected
