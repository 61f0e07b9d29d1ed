"""Inputs that nobody passes on purpose raise ordinary exceptions: no crash, and nothing half done."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses import LOSSES
from tllib_rs.self_training.cc_loss import CCConsistency
from tllib_rs.self_training.dst import WorstCaseEstimationLoss
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.mean_teacher import EMATeacher
from tllib_rs.self_training.pi_model import L2ConsistencyLoss
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss
from tllib_rs.vision.models.reid.loss import SoftTripletLoss, TripletLoss

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
INDEX = torch.tensor([1, 2])


def flexmatch():
    return DynamicThresholdingModule(0.9, True, lambda x: x, 3, 10, "cpu")


@every_loss
@pytest.mark.parametrize("layout", ["to_sparse", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_layouts_that_are_not_dense_are_refused(loss, generator, layout):
    inputs = [x.float() for x in loss.inputs(generator)]
    k = loss.differentiated
    inputs[k] = getattr(inputs[k], layout)()
    with pytest.raises(TypeError, match="must be a dense tensor, got a sparse, mkldnn or nested one"):
        loss.ours(*inputs)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.rand(3), torch.rand(4)])
    for call in (MinimumClassConfusionLoss(1.0), lambda x: TripletLoss(0.3)(x, torch.arange(2))):
        with pytest.raises(TypeError, match="must be a dense tensor"):
            call(nested)


@pytest.mark.filterwarnings("ignore:.*trace", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_loss
def test_a_trace_depends_on_its_input(loss, generator):
    """On its number of rows, too. Labels that the test makes from the input are constants of the trace."""
    labelled = "triplet" in loss.name or loss.name == "label_smooth"

    def call(*inputs):
        return loss.first(loss.ours(*inputs))

    traced = torch.jit.trace(call, loss.inputs(generator, 6), check_trace=False)
    other = loss.inputs(generator, 6 if labelled else 12)
    torch.testing.assert_close(traced(*other), call(*other))


@every_loss
def test_constants_from_inference_mode(loss, generator):
    if not loss.constant:
        return  # every input is differentiated, which an inference tensor cannot be
    inputs = [x.clone() for x in loss.inputs(generator)]
    expected = loss.first(loss.ours(*inputs))
    for k in loss.constant:
        with torch.inference_mode():
            inputs[k] = inputs[k].clone()
    inputs[loss.differentiated].requires_grad_()
    value = loss.first(loss.ours(*inputs))
    torch.testing.assert_close(value.detach(), expected)
    first = torch.autograd.grad(value.sum(), inputs[loss.differentiated], retain_graph=True)[0]
    again = torch.autograd.grad(value.sum(), inputs[loss.differentiated], create_graph=True)[0]
    torch.testing.assert_close(first, again.detach())


@every_loss
def test_storage_that_was_resized(loss, generator):
    """Many of torch's operations crash on it."""
    inputs = [x.clone() for x in loss.inputs(generator)]
    inputs[loss.differentiated].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has a storage of only 0 bytes"):
        loss.ours(*inputs)


def test_flexmatch_with_a_storage_that_was_resized():
    module = flexmatch()
    module.net_outputs.untyped_storage().resize_(16)
    for call in 2 * (lambda: module.get_threshold(INDEX), lambda: module.update(INDEX, torch.ones(2), INDEX)):
        with pytest.raises(RuntimeError, match="has a storage of only 16 bytes"):
            call()


def test_ema_with_a_storage_that_was_resized():
    model = nn.Linear(3, 2)
    teacher = EMATeacher(model, 0.9)
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has a storage of only 0 bytes"):
        teacher.update()


def test_numbers_that_no_float_holds():
    for call in (
        lambda: MinimumClassConfusionLoss(10**400),
        lambda: EMATeacher(nn.Linear(1, 1), 10**400),
        lambda: L2ConsistencyLoss()(torch.ones(2, 2), torch.ones(2, 2), 10**400),
    ):
        with pytest.raises(ValueError, match="must fit into 64 bits"):
            call()


def test_flexmatch_takes_no_tensor_without_memory():
    module = flexmatch()
    two = TwoTensor(INDEX, INDEX)
    with pytest.raises(TypeError, match="pseudo_labels must be an ordinary tensor on the CPU"):
        module.get_threshold(two)
    with pytest.raises(TypeError, match="selected_mask must be an ordinary tensor"):
        module.update(INDEX, TwoTensor(torch.ones(2), torch.ones(2)), INDEX)
    with pytest.raises(TypeError, match="net_outputs must be an ordinary tensor"):
        module.net_outputs = TwoTensor(torch.zeros(10).long(), torch.zeros(10).long())
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match="must be an ordinary tensor"):
        module.get_threshold(torch.tensor([0, 1]))
    assert module.class_counts().tolist() == [10, 0, 0, 0]
    with pytest.raises(ValueError, match="device must hold values, got meta"):
        DynamicThresholdingModule(0.9, True, abs, 3, 10, "meta")


def test_flexmatch_resolves_pending_negations():
    def negated(x):
        return torch._neg_view(-x)

    module = flexmatch()
    module.update(negated(INDEX), negated(torch.ones(2)), negated(INDEX))
    assert module.net_outputs.tolist() == [-1, 1, 2, *[-1] * 7]
    module.net_outputs = negated(torch.arange(10) % 3)
    assert module.class_counts().tolist() == [0, 4, 3, 3]


def test_flexmatch_takes_no_wrapper_of_a_transform():
    from tllib_rs import _core

    state = _core.FlexMatch(4, 5, "cpu", counts_on_device=True)

    def assign(x):
        with pytest.raises((RuntimeError, TypeError), match="vmap|ordinary tensor"):
            state.net_outputs = x
        return x

    torch.vmap(assign)(torch.zeros(2, 5, dtype=torch.long))
    torch.func.grad(lambda x: (assign(x.long()), x.sum())[1])(torch.zeros(5))
    assert state.counts().tolist() == [5, 0, 0, 0, 0]


class Without(TorchDispatchMode):
    """No memory for the operations whose name contains this."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.name in str(func):
            raise torch.OutOfMemoryError(self.name)
        return func(*args, **(kwargs or {}))


def _self_tuning():
    from tllib_rs import _core

    settings = _core.SelfTuningSettings(4, 2, 0.9, 0.07)
    return settings, (torch.randn(3, 5), torch.arange(3), torch.randn(5, 8))


def _forward():
    settings, (h, labels, queue) = _self_tuning()
    settings.forward(h, h, labels, queue)


def _enqueue():
    settings, (h, labels, queue) = _self_tuning()
    settings.enqueue(h, labels, queue, torch.zeros(4, dtype=torch.long))


def _average():
    EMATeacher(nn.Linear(2, 2), 0.5).update()


@pytest.mark.parametrize(
    ("call", "name"), [(_forward, "div"), (_enqueue, "index"), (_average, "mul"), (flexmatch, "fill")]
)
def test_operations_that_fail_leave_grad_mode_as_it_was(call, name):
    with Without(name), pytest.raises(torch.OutOfMemoryError, match=name):
        call()
    assert torch.is_grad_enabled()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_scratch_space_that_cannot_be_had_is_an_error():
    code = """if True:
        import resource, torch
        from tllib_rs.self_training.cc_loss import CCConsistency
        from tllib_rs.modules.entropy import entropy
        from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
        loss, logits = CCConsistency(1.0, 0.0), torch.randn(2000, 12000)
        strong = logits.clone().requires_grad_()
        loss(logits[:, :64], strong[:, :64])
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
        rows = torch.rand(1, 2).expand(1 << 42, 2)
        wide = torch.rand(1, 40000).expand(5000, 40000)
        for call in (
            lambda: loss(logits, strong),
            lambda: loss(wide, wide),
            lambda: entropy(rows, "mean"),
            lambda: MinimumClassConfusionLoss(1.0)(rows),
        ):
            try:
                call()
            except RuntimeError as error:
                print("not enough memory" in str(error))
    """
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout) == (0, 4 * "True\n"), run.stderr[-2000:]


def unaligned(x):
    """The same numbers, one byte past an aligned address."""
    return torch.frombuffer(bytearray(1) + bytearray(x.numpy().tobytes()), dtype=x.dtype, offset=1).view(
        x.shape
    )


def test_flexmatch_takes_elements_that_begin_anywhere():
    module = flexmatch()
    module.update(unaligned(INDEX), unaligned(torch.ones(2)), unaligned(INDEX))
    assert module.net_outputs.tolist() == [-1, 1, 2, *[-1] * 7]
    module.net_outputs = unaligned(torch.arange(10) % 3)
    assert module.class_counts().tolist() == [0, 4, 3, 3]


def test_parameters_that_begin_anywhere_are_averaged():
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student, 0.5)
    teacher.teacher.weight.data = unaligned(torch.ones(2, 3))
    student.weight.data = unaligned(torch.full((2, 3), 3.0))
    teacher.update()
    assert torch.equal(teacher.teacher.weight, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("spoil", ["expand", "meta"])
def test_an_average_that_fails_moves_nothing(spoil):
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    teacher = EMATeacher(student, 0.5)
    with torch.no_grad():
        student[0].weight.add_(1)
    if spoil == "expand":
        teacher.teacher[1].weight.data = torch.zeros(1, 2).expand(2, 2)
    else:
        student[1].to("meta")
    before = copy.deepcopy(teacher.teacher[0].state_dict())
    with pytest.raises((ValueError, RuntimeError), match="share memory|on the meta device"):
        teacher.update()
    torch.testing.assert_close(teacher.teacher[0].state_dict(), before)


@pytest.mark.parametrize(
    "make",
    [
        MinimumClassConfusionLoss,
        lambda number: CCConsistency(number, 0.5),
        lambda number: StrongWeakConsistencyLoss(0.5, number),
        WorstCaseEstimationLoss,
        lambda number: SoftTripletLoss(margin=number),
    ],
)
def test_numbers_that_would_be_trained_are_refused(make):
    make(torch.tensor(0.5))
    with pytest.raises(TypeError, match="requires a gradient"):
        make(torch.nn.Parameter(torch.tensor(0.5)))
