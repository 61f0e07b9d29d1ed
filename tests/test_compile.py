"""``torch.compile(fullgraph=True)`` of the methods that keep state: self-tuning, FlexMatch and the teacher.
The losses are in test_compiled_losses.py."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tllib_rs.self_training.cc_loss import CCConsistency
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.mean_teacher import EMATeacher
from tllib_rs.self_training.pi_model import L2ConsistencyLoss
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss
from tllib_rs.self_training.self_tuning import Classifier, SelfTuning
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss
from tllib_rs.vision.models.reid.loss import CrossEntropyLossWithLabelSmooth, TripletLoss

CLASSES, KEYS, ROWS, WIDTH = 5, 3, 7, 4
every_backend = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def self_tuning(dtype=torch.float64, **settings):
    def encoder():
        backbone = nn.Linear(WIDTH, 6)
        backbone.out_features = 6
        model = Classifier(backbone, CLASSES, 8, bottleneck_dim=9, pool_layer=nn.Identity())
        model.bottleneck[3].p = 0.0  # the backends draw different random numbers
        return model

    torch.manual_seed(0)
    settings = {"K": KEYS, "m": 0.9, "T": 0.2, **settings}
    return SelfTuning(encoder(), encoder(), CLASSES, **settings).to(dtype)


def batch(generator, rows=ROWS, dtype=torch.float64):
    views = torch.randn(2, rows, WIDTH, generator=generator).to(dtype)
    return *views, torch.randint(CLASSES, (rows,), generator=generator)


def train(model, call, batches):
    """Steps of tllib's example script: two forwards, then their backward. Returns what every step gave."""
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.05, momentum=0.9)
    found = []
    for im_q, im_k, labels in batches:
        first, second = call(im_q, im_k, labels), call(im_k, im_q, labels.flip(0))
        loss = sum(F.kl_div(out[0], out[1], reduction="batchmean") for out in (first, second))
        optimizer.zero_grad()
        (loss + F.cross_entropy(first[2], labels)).backward()
        grads = [p.grad.clone() for p in model.encoder_q.parameters()]
        optimizer.step()
        found.append([*first, *second, *grads, *(v.clone() for v in model.state_dict().values())])
    return found


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_self_tuning_trains_as_without(backend, dtype, generator):
    batches = [batch(generator, dtype=dtype) for _ in range(5)]
    eager, other = self_tuning(dtype), self_tuning(dtype)
    storage = other.queue_list.data_ptr()
    expected = train(eager, eager, batches)
    got = train(other, torch.compile(other, fullgraph=True, backend=backend), batches)
    # In float32, rounding differences in the layers around the operators are multiplied by 1 / T.
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3}[dtype]
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"{s}: {m}"
            )
    assert torch.equal(other.queue_ptr, eager.queue_ptr)
    assert other.queue_list.data_ptr() == storage
    assert all(p.grad is None for p in other.encoder_k.parameters())


@pytest.mark.parametrize("rows", [1, 2 * KEYS + 1])
def test_self_tuning_without_a_graph(rows, generator):
    """Under no_grad nothing is kept for backward; a queue that wraps twice ends as the eager one."""
    eager, other = self_tuning().eval(), self_tuning().eval()
    for model in (eager, other):
        model.encoder_q.training = model.encoder_k.training = True  # one row has no batch statistics
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    im_q, im_k, _ = batch(generator, rows)
    labels = torch.zeros(rows, dtype=torch.int32)
    with torch.no_grad():
        for a, b in zip(compiled(im_q, im_k, labels), eager(im_q, im_k, labels), strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(other.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_self_tuning_operators_in_half_types(dtype, generator):
    """Values as the eager step gives them, gradients in the dtype of the queries."""
    from tllib_rs import _core

    h_q, h_k = (F.normalize(torch.randn(6, 5, generator=generator), dim=1).to(dtype) for _ in range(2))
    labels = torch.randint(CLASSES, (6,), generator=generator)
    queue = F.normalize(torch.randn(5, CLASSES * KEYS, generator=generator), dim=0).to(dtype)
    settings = (CLASSES, KEYS, 0.9, 0.2)
    found = []
    for eager in (True, False):
        leaf, own = h_q.clone().requires_grad_(), queue.clone()
        pointers = torch.zeros(CLASSES, dtype=torch.int64)
        if eager:
            history, chosen = _core.SelfTuningHistory(), _core.SelfTuningSettings(*settings)
            out = history.step(leaf, h_k, labels, own, pointers, chosen)
        else:
            out, _ = torch.ops.tllib_rs.self_tuning(leaf, h_k, labels, own, *settings, [False])
            torch.ops.tllib_rs.self_tuning_enqueue(h_k, labels, own, pointers, *settings)
        out.square().sum().backward()
        found.append([out, leaf.grad, own, pointers])
        assert out.dtype == torch.float32
        assert leaf.grad.dtype == dtype
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["self_tuning", "self_tuning_backward", "self_tuning_enqueue", "pi_model"])
def test_operators_keep_torchs_contract(name, generator):
    """Schema, fake implementation and autograd registration, by torch's own checks."""
    h_q, h_k = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(CLASSES, (6,), generator=generator)
    queue = torch.randn(5, CLASSES * KEYS, generator=generator, dtype=torch.float64)
    settings = (CLASSES, KEYS, 0.9, 0.2)
    out = torch.randn(6, 1 + CLASSES * KEYS, generator=generator, dtype=torch.float64).log_softmax(1)
    arguments = {
        "self_tuning": (h_q.requires_grad_(), h_k, labels, queue, *settings, [False]),
        "self_tuning_backward": (torch.ones_like(out), out, h_q.detach(), h_k, labels, queue, *settings),
        "self_tuning_enqueue": (h_k, labels, queue, torch.zeros(CLASSES, dtype=torch.int64), *settings),
        "pi_model": (h_q, h_k, False, [False, False]),
    }
    torch.library.opcheck(getattr(torch.ops.tllib_rs, name).default, arguments[name])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda q, k, y: (q, k, y * 0 + CLASSES), IndexError, r"labels must be in \[0, 4\], got 5"),
        (lambda q, k, y: (q, k, y.float()), TypeError, "labels must be int64 or int32, got float32"),
        (lambda q, k, y: (q, k, y[1:]), ValueError, r"labels must have shape \(minibatch,\)"),
    ],
)
def test_self_tuning_refuses_before_anything_changes(wrong, error, message, generator):
    model = self_tuning()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compiled(*wrong(*batch(generator)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every_backend
@pytest.mark.parametrize("warmup", [True, False])
def test_flexmatch_steps_as_without(backend, warmup, generator):
    def step(module, y_weak, y_strong, idxes):
        confidence, labels = y_weak.softmax(1).max(1)
        threshold = module.get_threshold(labels)
        mask = (confidence > threshold).to(y_strong.dtype)
        module.update(idxes, (confidence > 0.3).long(), labels)
        rows = F.cross_entropy(y_strong, labels, reduction="none")
        return threshold, (rows * mask).mean(), module.get_threshold(labels)

    eager, other = (
        DynamicThresholdingModule(0.95, warmup, lambda x: x / (2 - x), CLASSES, 40, "cpu") for _ in range(2)
    )
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for k in range(6):
        y_weak = 2 * torch.randn(9, CLASSES, generator=generator)
        idxes = torch.randperm(40, generator=generator)[:9]
        found = []
        for module, call in ((eager, step), (other, compiled)):
            y_strong = y_weak.flip(0).requires_grad_()
            before, loss, after = call(module, y_weak, y_strong, idxes)
            loss.backward()
            found.append([before, loss, after, y_strong.grad, module.net_outputs.clone()])
            if k == 3:
                module.net_outputs[idxes[0]] = -1
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert (eager.net_outputs >= 0).any()


def test_flexmatch_calls_stay_where_nothing_uses_them(generator):
    """An update has no output: only its registration keeps the compiler from dropping it."""
    module = DynamicThresholdingModule(0.95, True, lambda x: x, CLASSES, 40, "cpu")
    twins = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(WithoutLambda()))]

    @torch.compile(fullgraph=True, backend="inductor")
    def update(module, idxes, labels):
        module.update(idxes, torch.ones_like(idxes), labels)

    for k, twin in enumerate(twins):
        update(twin, torch.tensor([k]), torch.tensor([k + 1]))
    # Each copy has a state of its own.
    for k, twin in enumerate(twins):
        assert twin.net_outputs.nonzero().numel() == 40
        assert (twin.net_outputs >= 0).nonzero().tolist() == [[k]]
        assert twin.net_outputs[k] == k + 1


class WithoutLambda(DynamicThresholdingModule):
    """One that can be pickled."""

    def __init__(self):
        super().__init__(0.95, True, torch.square, CLASSES, 40, "cpu")


@every_backend
def test_teacher_follows_as_without(backend, generator):
    """The update with a decay that changes at each step, in a graph of its own."""
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    eager, other = (EMATeacher(student, 0.9) for _ in range(2))
    update = torch.compile(lambda teacher: teacher.update(), fullgraph=True, backend=backend)
    storage = [p.data_ptr() for p in other.teacher.parameters()]
    for step in range(1, 6):
        for parameter in student.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator)
        for teacher in (eager, other):
            teacher.set_alpha(min(0.9, 1 - 1 / step))
        eager.update()
        update(other)
        for a, b in zip(other.state_dict().values(), eager.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
    assert [p.data_ptr() for p in other.teacher.parameters()] == storage


@every_backend
def test_teacher_in_a_compiled_step(backend, generator):
    """Student, teacher, loss and update in one graph."""
    student = nn.Linear(4, 3)
    twins = [copy.deepcopy(student) for _ in range(2)]
    teachers = [EMATeacher(twin, 0.9) for twin in twins]

    def step(student, teacher, x):
        loss = (student(x) - teacher(x)).square().mean() + student(x).mean()
        teacher.update()
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        x = torch.randn(5, 4, generator=generator)
        for call, twin, teacher in zip((step, compiled), twins, teachers, strict=True):
            twin.zero_grad()
            call(twin, teacher, x).backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter -= 0.1 * parameter.grad
        for a, b in zip(*(teacher.state_dict().values() for teacher in teachers), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(twins[0].weight, twins[1].weight)


def test_gradients_of_a_composite_are_laid_out_as_inductor_expects(generator):
    """Inductor checks the strides of an operator's outputs."""
    p1, p2 = (torch.rand(3, 8, generator=generator, dtype=d).t() for d in (torch.float32, torch.float64))
    loss, inputs = L2ConsistencyLoss(), (p1.requires_grad_(), p2.requires_grad_())
    compiled = torch.compile(lambda *p: loss(*(2 * x for x in p)), fullgraph=True)
    got, expected = (
        torch.autograd.grad(f(*x), inputs) for f, x in ((compiled, inputs), (loss, [2 * x for x in inputs]))
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_with_state_are_no_part_of_cuda_graphs():
    """By their tag and, where inductor does not look at the tag, by inductor's own list."""
    module = DynamicThresholdingModule(0.95, True, lambda x: x, CLASSES, 40, "cpu")
    torch.compile(module.get_threshold, backend="aot_eager")(torch.arange(CLASSES))
    for name in ("ema_update", "self_tuning_momentum", "flexmatch_status", "flexmatch_update"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.tllib_rs, name).default.tags
    assert "tllib_rs::flexmatch_status" in torch._inductor.config.custom_should_partition_ops


FLEXMATCH_BATCH = (torch.arange(5), torch.ones(5), torch.tensor([0, 1, 1, 2, 2]))


def _written_before(module):
    module.net_outputs.fill_(-1)
    module.update(*FLEXMATCH_BATCH)


def _written_alone(module):
    module.net_outputs[FLEXMATCH_BATCH[0]] = FLEXMATCH_BATCH[2]


def _written_after(module):
    module.update(*FLEXMATCH_BATCH)
    module.net_outputs.data.fill_(3)


def _assigned_after(module):
    module.update(*FLEXMATCH_BATCH)
    module.net_outputs = torch.full((12,), 3)


@pytest.mark.parametrize("write", [_written_before, _written_alone, _written_after, _assigned_after])
def test_flexmatch_with_labels_that_a_compiled_function_reads_and_writes(write):
    def step(module):
        before = module.net_outputs.sum()
        write(module)
        return before, module.get_threshold(FLEXMATCH_BATCH[2]), module.net_outputs.sum()

    results = []
    for call in (step, torch.compile(step, backend="aot_eager")):
        module = DynamicThresholdingModule(0.95, True, lambda x: x, 4, 12, "cpu")
        module.net_outputs.fill_(2)
        results.append([*call(module), module.net_outputs])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know", "ignore:The .grad attribute")
def test_a_setting_that_would_need_a_gradient_raises_as_without():
    loss = MinimumClassConfusionLoss(2.0)
    loss.temperature = torch.tensor(2.0, requires_grad=True)
    for call in (loss, torch.compile(loss, backend="aot_eager")):
        with pytest.raises(TypeError, match="a constant here"):
            call(torch.randn(8, 4))


def test_masks_are_checked_as_without():
    loss, p = L2ConsistencyLoss(), torch.rand(4, 5)
    compiled = torch.compile(loss, backend="aot_eager")
    for mask in (torch.ones(4, 1), torch.ones(2, 4), torch.ones(3), torch.ones(4, dtype=torch.complex64)):
        errors = []
        for call in (loss, compiled):
            with pytest.raises((TypeError, ValueError)) as error:
                call(p, p, mask)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]
    for mask in (torch.ones(4), torch.ones(1), torch.tensor(2.0), 0.5):
        torch.testing.assert_close(compiled(p, p + 1, mask), loss(p, p + 1, mask))


@pytest.mark.parametrize("make", [np.float64, np.float32, np.int64])
def test_settings_that_are_numbers_of_numpy(make):
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    for call, inputs in (
        (ConfidenceBasedSelfTrainingLoss(make(0)), (x, x)),
        (MinimumClassConfusionLoss(make(1)), (x,)),
        (StrongWeakConsistencyLoss(make(0), make(1)), (x, x)),
        (CCConsistency(make(1), make(0)), (x, x)),
        (TripletLoss(make(1)), (x, labels)),
        (CrossEntropyLossWithLabelSmooth(4, make(0)), (x, labels // 2)),
    ):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
