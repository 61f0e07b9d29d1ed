"""EMATeacher in real trainings: wrappers, mixed precision, schedules, buffers."""

import copy

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tllib_rs.schedules import WarmUp
from tllib_rs.self_training.mean_teacher import EMATeacher


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def move(module):
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            tensor.add_(torch.randn_like(tensor))
        for buffer in module.buffers():
            if not buffer.is_floating_point():
                buffer.add_(3)


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def compiled(module):
    return torch.compile(module, backend="eager")


def distributed(module):
    return nn.parallel.DistributedDataParallel(module)


WRAPPERS = {
    "data_parallel": nn.DataParallel,
    "compile": compiled,
    "compile_of_data_parallel": lambda module: compiled(nn.DataParallel(module)),
}


def _check_wrapped(wrap, before, unwrap):
    """The average of a wrapped student, wrapped before or after the teacher was made, is the plain one's."""
    plain, module = net(), net()
    expected = EMATeacher(plain, 0.7)
    wrapped = wrap(module)
    teacher = EMATeacher(wrapped if before else module, 0.7, unwrap=unwrap)
    teacher.model = wrapped
    for step in range(3):
        for student in (plain, module):
            torch.manual_seed(step)
            move(student)
        expected.update()
        teacher.update()
    for ours, theirs in zip(teacher.teacher.parameters(), expected.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(6, 4)
    expected.eval()
    teacher.eval()
    assert torch.equal(teacher(x), expected(x))
    if unwrap:
        assert type(teacher.teacher) is nn.Sequential
        assert teacher.module is teacher.teacher
        assert list(teacher.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize("unwrap", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_seen_through(name, before, unwrap):
    _check_wrapped(WRAPPERS[name], before, unwrap)


def _check_distributed(_rank):
    for before in (False, True):
        for unwrap in (False, True):
            _check_wrapped(distributed, before, unwrap)
            _check_wrapped(lambda module: compiled(distributed(module)), before, unwrap)


def test_distributed_wrappers_are_seen_through():
    run_ranks(2, _check_distributed)


@pytest.mark.parametrize("name", WRAPPERS)
def test_states_of_wrapped_teachers_load_without_wrappers(name):
    source = EMATeacher(WRAPPERS[name](net()), 0.5, schedule="warmup")
    move(source.model)
    source.update()
    target = EMATeacher(net(), 0.5, unwrap=True, schedule="warmup")
    state = source.state_dict()
    keys, metadata = list(state), dict(state._metadata)
    target.load_state_dict(state)
    assert (list(state), state._metadata) == (keys, metadata)
    assert target.step == 1
    for ours, theirs in zip(target.teacher.parameters(), source.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="Missing key"):
        EMATeacher(net(), 0.5).load_state_dict(state)


def test_a_module_named_module_keeps_its_name():
    student = nn.ModuleDict({"module": nn.Linear(2, 2)})
    source, target = (EMATeacher(copy.deepcopy(student), 0.5, unwrap=True) for _ in range(2))
    move(source.teacher)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.teacher["module"].weight, source.teacher["module"].weight)


def _half_precision_run(steps, alpha=0.9999):
    """The relative distance of a float32 teacher to the float64 one, and of a bfloat16 teacher to its start."""
    student = nn.Linear(16, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        # Half a unit in the last place of w is at least w / 512, and the step 1e-4 of the way: a student less
        # than 19 w away cannot move a bfloat16 teacher. Weights near 0 would move, so there are none.
        for parameter in student.parameters():
            parameter.uniform_(0.5, 1)
    wide = EMATeacher(student, alpha, dtype=torch.float32)
    naive = EMATeacher(student, alpha)
    exact = [parameter.double() for parameter in student.parameters()]
    start, master = values(student), [parameter.detach().float() for parameter in student.parameters()]
    for _ in range(steps):
        with torch.no_grad():
            for parameter, weight in zip(student.parameters(), master, strict=True):
                # Noise around a drift to 3, as from a float32 optimizer of bfloat16 weights.
                parameter.copy_(weight.mul_(0.999).add_(0.003 + 0.04 * torch.randn_like(weight)))
        wide.update()
        naive.update()
        for mean, parameter in zip(exact, student.parameters(), strict=True):
            mean.mul_(alpha).add_(parameter.detach().double(), alpha=1 - alpha)
    flat = [torch.cat([t.detach().double().flatten() for t in each])
            for each in (wide.teacher.parameters(), exact, naive.teacher.parameters(), start)]  # fmt: skip
    tracked, reference, stuck, begun = flat
    assert (reference - begun).norm() > begun.norm(), "the student must move for this to mean anything"
    return ((tracked - reference).norm() / reference.norm()).item(), torch.equal(stuck, begun)


def test_a_float32_teacher_of_a_bfloat16_student_follows_and_a_bfloat16_one_stands_still():
    error, stands_still = _half_precision_run(10_000)
    assert error < 1e-3
    assert stands_still


@pytest.mark.parametrize("unwrap", [False, True])
def test_dtype_and_device(unwrap):
    student = net().to(torch.float16)
    student.tied = student[0]
    student.register_buffer("table", torch.zeros(2, dtype=torch.complex64))
    teacher = EMATeacher(student, 0.5, dtype=torch.float64, device="meta", unwrap=unwrap)
    for ours, theirs in zip(teacher.teacher.parameters(), student.parameters(), strict=True):
        assert (ours.dtype, ours.device.type, ours.requires_grad) == (torch.float64, "meta", False)
        assert isinstance(ours, nn.Parameter)
        assert (theirs.dtype, theirs.device.type, theirs.requires_grad) == (torch.float16, "cpu", True)
    assert {str(b.dtype) for b in teacher.teacher.buffers()} == {
        "torch.float64",
        "torch.int64",
        "torch.complex64",
    }
    assert teacher.teacher.tied is teacher.teacher[0]
    same = EMATeacher(student, 0.5, dtype=torch.float32, device="cpu")
    for ours, theirs in zip(same.teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    move(student)
    same.update()
    assert same.teacher[0].weight.dtype == torch.float32


@pytest.mark.parametrize("buffers", ["leave", "copy", "average"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_buffers(buffers, dtype):
    student = net()
    teacher = EMATeacher(student, 0.75, buffers=buffers, dtype=dtype)
    before = {name: buffer.clone() for name, buffer in teacher.teacher.named_buffers()}
    weights = values(teacher.teacher)
    move(student)
    teacher.update()
    for name, buffer in teacher.teacher.named_buffers():
        theirs = dict(student.named_buffers())[name].to(buffer.dtype)
        expected = {"leave": before[name], "copy": theirs, "average": 0.75 * before[name] + 0.25 * theirs}
        if buffers == "average" and not buffer.is_floating_point():
            expected["average"] = theirs
        torch.testing.assert_close(buffer, expected[buffers])
    for ours, old, new in zip(teacher.teacher.parameters(), weights, student.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * new.to(old.dtype))


def test_buffers_that_do_not_correspond_change_nothing():
    student = net()
    teacher = EMATeacher(student, 0.5, buffers="average")
    before = copy.deepcopy(teacher.state_dict())
    move(student)
    student[1].running_var = torch.ones(7)
    with pytest.raises(
        ValueError, match=r"teacher buffer must have the student's shape \[7\], got shape \[5\]"
    ):
        teacher.update()
    student.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match="must have the same buffers, got 3 and 4"):
        teacher.update()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_warm_up_is_timm_s():
    """Values of timm 1.0's ``ModelEmaV3(use_warmup=True).get_decay(step)``, worked out by hand."""
    assert [WarmUp(0.9999)(step) for step in (0, 1)] == [0.0, 0.0]
    assert WarmUp(0.9999)(2) == pytest.approx(1 - 2 ** (-2 / 3))
    assert WarmUp(0.9999)(8) == pytest.approx(0.75)
    assert WarmUp(0.9999)(31_624) == pytest.approx(0.999, abs=1e-6)
    assert WarmUp(0.99)(10**9) == 0.99
    assert WarmUp(0.9999, gamma=4, power=0.5)(1 + 4 * 8) == pytest.approx(2 / 3)
    assert WarmUp(0.9999, min_alpha=0.5)(2) == 0.5
    assert [WarmUp(0.9999, power=1, start=10)(step) for step in (11, 12, 14)] == [0, 0.5, 0.75]


def test_schedules_give_the_factor_of_each_update():
    student, steps = net(), []

    def schedule(step):
        steps.append(step)
        return 1 - 1 / step

    mean, warm = EMATeacher(student, 0.9, schedule=schedule), EMATeacher(student, 0.9, schedule="warmup")
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in student.parameters()]
    for step in range(1, 7):
        move(student)
        mean.update()
        warm.update()
        assert (mean.step, warm.step) == (step, step)
        assert warm.alpha == WarmUp(0.9)(step)
        if step == 1:  # both factors are 0: the student is copied
            assert torch.equal(warm.teacher[0].weight, student[0].weight)
        for total, parameter, ours in zip(sums, student.parameters(), mean.teacher.parameters(), strict=True):
            total += parameter.detach()
            torch.testing.assert_close(ours.double(), total / step, rtol=1e-5, atol=1e-6)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_schedule_that_fails_changes_nothing():
    student = net()
    teacher = EMATeacher(student, 0.9, schedule=lambda step: 2.0)
    before = values(teacher.teacher)
    move(student)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        teacher.update()
    assert (teacher.step, teacher.alpha) == (0, 0.9)
    assert all(map(torch.equal, values(teacher.teacher), before))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"dtype": torch.int64}, ValueError, "dtype must be floating point, got torch.int64"),
        ({"buffers": "swap"}, ValueError, "buffers must be one of leave, copy, average, got 'swap'"),
        ({"schedule": "cosine"}, ValueError, "schedule must be callable or 'warmup', got 'cosine'"),
        ({"teacher": 3}, TypeError, "teacher must be a torch.nn.Module, got int"),
        ({"teacher": net(), "unwrap": True}, ValueError, "shape a copy, and teacher takes its place"),
        ({"teacher": nn.Linear(4, 5)}, ValueError, "must have the same parameters, got 2 and 6"),
    ],
)
def test_bad_keywords(arguments, error, message):
    with pytest.raises(error, match=f"EMATeacher: .*{message}"):
        EMATeacher(net(), 0.5, **arguments)


def test_a_teacher_handed_in_starts_as_the_student_and_shares_nothing():
    student, other = net(), net()
    move(other)
    teacher = EMATeacher(student, 0.5, teacher=other)
    assert teacher.teacher is other
    assert all(map(torch.equal, other.state_dict().values(), student.state_dict().values()))
    with pytest.raises(ValueError, match="must have parameters of its own, got some of model's"):
        EMATeacher(student, 0.5, teacher=nn.Sequential(*student))


def test_alpha_follows_a_schedule_only():
    with pytest.raises(ValueError, match="alpha follows the schedule and cannot be set"):
        EMATeacher(net(), 0.5, schedule="warmup").set_alpha(0.4)
