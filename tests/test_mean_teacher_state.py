"""EMATeacher's saved progress: step and alpha travel with the state, and tllib does not see them."""

import copy
import io
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from tests.test_mean_teacher_training import move, net, values
from tllib_rs.self_training.mean_teacher import EMATeacher

STEM = "self_training.mean_teacher"

REBUILDS = {
    "as it is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "file": lambda state: torch.load(_file(state), weights_only=True),
    "nested in a file": lambda state: torch.load(_file({"ema": state, "epoch": 3}), weights_only=True)["ema"],
}


def _file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _trained(steps, **options):
    student = net()
    teacher = EMATeacher(student, 0.9, **options)
    for step in range(steps):
        torch.manual_seed(100 + step)
        move(student)
        teacher.update()
    return teacher


@pytest.mark.parametrize("options", [{"schedule": "warmup"}, {"track": True}], ids=["schedule", "track"])
@pytest.mark.parametrize("rebuild", REBUILDS)
def test_a_resumed_teacher_goes_on_where_it_stopped(rebuild, options):
    straight, stopped = _trained(7, **options), _trained(4, **options)
    if "track" in options:
        stopped.set_alpha(0.8)
    resumed = EMATeacher(copy.deepcopy(stopped.model), 0.9, **options)
    resumed.load_state_dict(REBUILDS[rebuild](stopped.state_dict()))
    assert (resumed.step, resumed.alpha) == (4, stopped.alpha)
    if "track" in options:
        resumed.set_alpha(0.9)
    for step in range(4, 7):
        torch.manual_seed(100 + step)
        move(resumed.model)
        resumed.update()
    assert resumed.step == 7
    assert all(map(torch.equal, values(resumed.teacher), values(straight.teacher)))


def test_tracked_states_go_both_ways_with_tllib_s(standin):
    ours, theirs = _trained(3, schedule="warmup"), standin(STEM, "EMATeacher")(net(), 0.9)
    state = torch.load(_file(ours.state_dict()), weights_only=True)
    assert list(state) == list(theirs.state_dict())
    assert theirs.teacher.load_state_dict(state, strict=True).missing_keys == []
    theirs.load_state_dict(state)
    assert all(map(torch.equal, values(theirs.teacher), values(ours.teacher)))
    move(theirs.teacher)
    fresh = EMATeacher(net(), 0.9)
    fresh.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, values(theirs.teacher), values(fresh.teacher)))


@pytest.mark.parametrize(
    "plain", [dict, lambda state: OrderedDict(state.items())], ids=["dict", "rebuilt from its items"]
)
def test_a_state_without_progress_loads_and_says_so(plain):
    source, target = _trained(3, schedule="warmup"), _trained(2, schedule="warmup")
    with pytest.warns(UserWarning, match="carries no step and alpha; going on from step 2 with alpha 0.37"):
        target.load_state_dict(plain(source.state_dict()))
    assert target.step == 2
    assert all(map(torch.equal, values(target.teacher), values(source.teacher)))


def test_defaults_save_and_load_as_tllib_does():
    source, target = _trained(3, track=True), EMATeacher(net(), 0.5)
    target.load_state_dict(source.state_dict())
    assert (target.alpha, target.step) == (0.5, 0)
    state, plain = target.state_dict(), target.teacher.state_dict()
    assert state._metadata == plain._metadata


@pytest.mark.parametrize("progress", [{"step": -1, "alpha": 0.5}, {"step": 1, "alpha": 7.0}])
def test_a_state_with_wrong_progress_changes_nothing(progress):
    teacher, source = _trained(2, track=True), _trained(3, track=True)
    before, state = values(teacher.teacher), source.state_dict()
    state._metadata["<tllib_rs.EMATeacher>"] = progress
    with pytest.raises(ValueError, match="EMATeacher: (step in the state|alpha must be)"):
        teacher.load_state_dict(state)
    assert teacher.step == 2
    assert all(map(torch.equal, values(teacher.teacher), before))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_that_was_written_in_place_says_nothing_of_progress(tmp_path):
    """torch.distributed.checkpoint writes into the teacher's own state, which carries the old step."""
    teacher = _trained(5, track=True)
    checkpoint.save({"ema": teacher}, checkpoint_id=tmp_path)
    other = _trained(2, track=True)
    with pytest.warns(UserWarning, match="own, written in place .*; going on from step 2"):
        checkpoint.load({"ema": other}, checkpoint_id=tmp_path)
    assert all(map(torch.equal, other.teacher.parameters(), teacher.teacher.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    assert other.step == 5


@pytest.mark.parametrize("how", ["constructed", "scheduled", "set"])
def test_decays_that_numpy_computed_are_saved_as_numbers(how):
    settings = (
        {"schedule": lambda k: 1 - 0.5 * np.cos(0.1 * k) / k} if how == "scheduled" else {"track": True}
    )
    teacher = EMATeacher(nn.Linear(2, 2), np.float64(0.9), **settings)
    if how == "set":
        teacher.set_alpha(np.float32(0.5))
    teacher.update()
    buffer = io.BytesIO()
    torch.save(teacher.state_dict(), buffer)
    buffer.seek(0)
    again = EMATeacher(nn.Linear(2, 2), 0.1, **settings)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert (again.step, again.alpha) == (1, teacher.alpha)
