"""Mean teacher."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import golden
from tests.plain.mean_teacher import EMATeacher as Plain
from tllib_rs.self_training.mean_teacher import EMATeacher, set_requires_grad, update_bn


class TinyNet(nn.Module):
    """The network of the recorded cases."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.norm(F.relu(self.bn1(self.conv(x))).mean((2, 3))))


def part(inputs, prefix):
    """The tensors of a state, by their names in it."""
    return {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}


def set_parameters(module, values):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


def check_state(case, prefix, module, precision):
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    names = [k for k in case.entry["outputs"] if k.startswith(prefix)]
    assert names
    for name in names:
        case.check(name, state[name.removeprefix(prefix)], precision)


def recorded(prefix):
    return golden.cases("mean_teacher", lambda c: c.name.startswith(prefix) and not c.raises)


@pytest.mark.parametrize("case", recorded("ema_alpha") + recorded("set_alpha_schedule"), ids=repr)
def test_golden_ema(case, precision):
    inputs = case.inputs(precision)
    student = TinyNet().to(precision)
    student.load_state_dict(part(inputs, "state0:"))
    teacher = EMATeacher(student, case.ctor["alpha"])
    identity = [(id(p), p.data_ptr()) for p in teacher.teacher.parameters()]
    for k in range(1, 11):
        set_parameters(student, part(inputs, f"student{k}:"))
        if case.name == "set_alpha_schedule":
            teacher.set_alpha(min(0.99, 1 - 1 / k))
        teacher.update()
        if f"after{k}:head.bias" in case.entry["outputs"]:
            check_state(case, f"after{k}:", teacher.teacher, precision)
    assert [(id(p), p.data_ptr()) for p in teacher.teacher.parameters()] == identity
    assert not any(p.requires_grad for p in teacher.teacher.parameters())
    buffers = [k for k in case.entry["outputs"] if k.startswith("teacher_buffers:")]
    if buffers:
        check_state(case, "teacher_buffers:", teacher.teacher, precision)


@pytest.mark.parametrize("case", recorded("replace_head"), ids=repr)
def test_golden_replaced_head(case, precision):
    inputs = case.inputs(precision)
    student = TinyNet().to(precision)
    student.load_state_dict(part(inputs, "state0:"))
    teacher = EMATeacher(student, case.ctor["alpha"])
    steps = sorted({int(k[7:].split(":")[0]) for k in inputs if k.startswith("student")})
    for k in steps:
        if k == 4:
            student.head, teacher.teacher.head = nn.Linear(3, 6).to(precision), nn.Linear(3, 6).to(precision)
            set_parameters(student.head, part(inputs, "new_head:head."))
            set_parameters(teacher.teacher.head, part(inputs, "new_teacher_head:head."))
        set_parameters(student, part(inputs, f"student{k}:"))
        teacher.update()
        check_state(case, f"after{k}:", teacher.teacher, precision)
    # set_requires_grad ran in the constructor only, as in tllib.
    assert teacher.teacher.head.weight.requires_grad


@pytest.mark.parametrize("case", golden.cases("mean_teacher", lambda c: c.name == "update_bn"), ids=repr)
def test_golden_update_bn(case, precision):
    inputs = case.inputs(precision)
    model, ema = TinyNet().to(precision), TinyNet().to(precision)
    model.load_state_dict(part(inputs, "student:") or part(inputs, "model:"))
    ema.load_state_dict(part(inputs, "teacher:"))
    update_bn(model, ema)
    check_state(case, "teacher_after:", ema, precision)


@pytest.mark.parametrize("case", golden.cases("mean_teacher", lambda c: c.raises), ids=repr)
def test_golden_raises(case):
    error = {"AssertionError": AssertionError, "KeyError": KeyError}[case.raises]
    if case.name == "set_alpha_negative":
        with pytest.raises(error):
            EMATeacher(TinyNet(), 0.9).set_alpha(-0.1)
    else:
        net = nn.ModuleDict({"bn_block": nn.Linear(2, 2)})
        with pytest.raises(error):
            update_bn(net, copy.deepcopy(net))


def pair(module, alpha=0.9, dtype=None):
    """Ours and plain, from one start, and a student that moved."""
    ours, plain = EMATeacher(module, alpha), Plain(module, alpha)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return ours, plain


def assert_same(ours, plain):
    for a, b in zip(ours.teacher.parameters(), plain.teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.again = self.embed


def channels_last():
    return nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)


def frozen():
    net = TinyNet()
    set_requires_grad(net.conv)
    return net


class OwnParameters(nn.Module):
    """Overrides ``parameters``, which shows only half of them."""

    def __init__(self):
        super().__init__()
        self.shown, self.hidden = nn.Linear(3, 3), nn.Linear(3, 3)

    def parameters(self, recurse=True):
        return self.shown.parameters(recurse)


@pytest.mark.parametrize(
    "build",
    [TinyNet, Tied, channels_last, frozen, lambda: nn.DataParallel(TinyNet()), OwnParameters,
     nn.Sequential, lambda: nn.Embedding(0, 3)],
    ids=["net", "tied", "channels_last", "frozen", "data_parallel", "own_parameters", "empty", "zero"],
)  # fmt: skip
def test_modules_of_every_kind(build):
    ours, plain = pair(build())
    for _ in range(3):
        ours.update()
        plain.update()
    assert_same(ours, plain)


def test_student_of_another_layout_dtype_and_expanded():
    module = nn.Conv2d(4, 4, 3)
    ours, plain = pair(module)
    module.to(memory_format=torch.channels_last)
    ours.update()
    plain.update()
    assert_same(ours, plain)
    student = nn.Linear(3, 3).to(torch.bfloat16)
    teacher = EMATeacher(student, 0.5)
    teacher.teacher.float()
    before = teacher.teacher.weight.clone()
    with torch.no_grad():
        student.weight.fill_(2.0)
    teacher.update()
    torch.testing.assert_close(teacher.teacher.weight, 0.5 * before + 1.0)
    assert teacher.teacher.weight.dtype == torch.float32
    assert torch.float16 == EMATeacher(nn.Linear(2, 2).half(), 0.5).teacher.weight.dtype


def test_overlapping_parameters_are_updated_one_after_the_other():
    flat = torch.arange(6.0)
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
    ours = EMATeacher(module, 0.5)
    shared = torch.zeros(6)
    ours.teacher.a.data, ours.teacher.b.data = shared[:4], shared[2:]
    ours.update()
    expected = torch.zeros(6)
    expected[:4] += 0.5 * flat[:4]
    expected[2:] = 0.5 * expected[2:] + 0.5 * flat[2:]
    torch.testing.assert_close(shared, expected)


def test_a_teacher_in_the_students_memory_reads_the_student_first():
    module = nn.Module()
    module.same, module.shifted = (nn.Parameter(torch.arange(1.0, 4)) for _ in range(2))
    teacher = EMATeacher(module, 0.5)
    memory = torch.arange(1.0, 5)
    teacher.teacher.same.data = module.same.data
    teacher.teacher.shifted.data, module.shifted.data = memory[:3], memory[1:]
    teacher.update()
    assert torch.equal(module.same, torch.arange(1.0, 4))
    torch.testing.assert_close(memory, torch.tensor([1.5, 2.5, 3.5, 4.0]))


def test_a_graph_that_saved_the_teacher_notices_the_update():
    student = nn.Linear(3, 3)
    teacher = EMATeacher(student, 0.5)
    x = torch.ones(2, 3, requires_grad=True)
    y = teacher(x).sum()
    teacher.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_threads_split_large_models():
    net = nn.Sequential(*[nn.Linear(700, 700) for _ in range(4)], nn.Linear(3, 5))
    ours, plain = pair(net, alpha=0.999)
    ours.update()
    plain.update()
    assert_same(ours, plain)


def test_delegation():
    teacher = EMATeacher(nn.DataParallel(TinyNet()), 0.9)
    assert teacher.module is teacher.teacher.module
    teacher.eval()
    assert not teacher.teacher.training
    teacher.train()
    assert teacher.teacher.training
    other = EMATeacher(nn.DataParallel(TinyNet()), 0.9)
    other.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(other.state_dict(), teacher.state_dict())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"EMATeacher: alpha must be in \[0, 1\], got"):
        EMATeacher(TinyNet(), alpha)
    teacher = EMATeacher(TinyNet(), 0.9)
    with pytest.raises(ValueError, match="alpha"):
        teacher.set_alpha(alpha)
    assert teacher.alpha == 0.9
    before = copy.deepcopy(teacher.state_dict())
    teacher.alpha = alpha
    with pytest.raises(ValueError, match="alpha"):
        teacher.update()
    torch.testing.assert_close(teacher.state_dict(), before)


def test_bad_models():
    with pytest.raises(TypeError, match="EMATeacher: model must be a torch.nn.Module, got int"):
        EMATeacher(3, 0.9)
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        EMATeacher(TinyNet(), "0.9")
    with pytest.raises(TypeError, match="set_requires_grad: net must be a torch.nn.Module, got NoneType"):
        set_requires_grad(None)
    with pytest.raises(TypeError, match="update_bn: model must be a torch.nn.Module, got int"):
        update_bn(1, TinyNet())
    for replace, message in [
        (nn.Linear(3, 9), r"teacher parameter must have the student's shape \[9, 3\], got shape \[4, 3\]"),
        (nn.Linear(3, 4, bias=False), "teacher and student must have the same parameters, got 7 and 6"),
    ]:
        student = TinyNet()
        teacher = EMATeacher(student, 0.5)
        before = copy.deepcopy(teacher.state_dict())
        with torch.no_grad():
            student.conv.weight.add_(1)
        student.head = replace
        with pytest.raises(ValueError, match=message):
            teacher.update()
        torch.testing.assert_close(teacher.state_dict(), before)


def test_integer_parameters_are_refused():
    module = nn.Module()
    module.p = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="teacher parameter must be float32, .* got int64"):
        EMATeacher(module, 0.5).update()


def test_update_bn_copies_nothing_when_it_raises():
    def net():
        return nn.ModuleDict({"bn_good": nn.BatchNorm1d(2), "bn_bad": nn.Linear(2, 2)})

    model, ema = net(), net()
    model["bn_good"].running_mean.fill_(5)
    with pytest.raises(KeyError):
        update_bn(model, ema)
    assert (ema["bn_good"].running_mean == 0).all()


def test_updates_inside_a_transform_of_torch_func():
    student = nn.Linear(3, 2)
    teacher, outside = EMATeacher(student, 0.5), EMATeacher(student, 0.5)

    def loss(weight):
        teacher.update()
        return weight * teacher(torch.ones(1, 3)).sum().detach()

    for step in range(3):
        with torch.no_grad():
            student.weight.fill_(step)
        torch.func.grad(loss)(torch.tensor(1.0))
        outside.update()
        torch.testing.assert_close(teacher.teacher.weight, outside.teacher.weight, rtol=0, atol=0)
    assert not teacher.teacher.weight.eq(student.weight).any()


@pytest.mark.parametrize("apart", [False, True])
def test_half_precision_stays_where_the_student_stands(apart):
    """Even where the two are averaged on their own, because their strides differ."""
    for dtype in (torch.bfloat16, torch.float16):
        student = nn.Linear(4, 4, bias=False).to(dtype)
        with torch.no_grad():
            student.weight.fill_(0.7)
        teacher = EMATeacher(student, 0.998)
        if apart:
            teacher.teacher.weight.data = teacher.teacher.weight.data.t()
        for _ in range(300):
            teacher.update()
        assert torch.equal(teacher.teacher.weight, student.weight)


class Hiding(nn.Sequential):
    """Leaves its children out."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self


def test_the_parameters_that_a_model_names_are_averaged():
    def student(hiding):
        return nn.Sequential(nn.Linear(2, 2), hiding(nn.Linear(2, 2)))

    for hiding in (nn.Sequential, Hiding):
        model = student(hiding)
        teacher = EMATeacher(model, 0.5)
        named = {id(p) for p in teacher.teacher.parameters()}
        assert len(named) == (4 if hiding is nn.Sequential else 2)
        before = [p.clone() for p in teacher.teacher[1][0].parameters()]
        with torch.no_grad():
            for p in (*model[0].parameters(), *model[1][0].parameters()):
                p.add_(1)
        teacher.update()
        assert not torch.equal(teacher.teacher[0].weight, model[0].weight)
        for p, old in zip(teacher.teacher[1][0].parameters(), before, strict=True):
            assert torch.equal(p, old) == (hiding is Hiding)

    model = student(nn.Sequential)
    model.parameters = model[0].parameters
    teacher = EMATeacher(model, 0.5)
    teacher.teacher.parameters = teacher.teacher[0].parameters
    with torch.no_grad():
        model[1][0].weight.add_(1)
    before = teacher.teacher[1][0].weight.clone()
    teacher.update()
    assert torch.equal(teacher.teacher[1][0].weight, before)


def test_a_teacher_without_values_is_left_alone():
    with torch.device("meta"):
        teacher = EMATeacher(nn.Linear(2, 2), 0.9)
    teacher.update()
    assert teacher.teacher.weight.is_meta
