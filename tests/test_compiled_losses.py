"""Every loss under ``torch.compile``: an opaque operator if a kernel serves, and its composite if none does.
The methods that keep state are in test_compile.py."""

import copy
from contextlib import contextmanager

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.losses import LOSSES
from tests.test_losses import assert_agree, every_loss, leaves, run
from tllib_rs import _core, _library
from tllib_rs.self_training.cc_loss import CCConsistency
from tllib_rs.self_training.dst import WorstCaseEstimationLoss
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss
from tllib_rs.self_training.uda import StrongWeakConsistencyLoss
from tllib_rs.vision.models.reid.loss import (
    CrossEntropyLossWithLabelSmooth,
    SoftTripletLoss,
    TripletLoss,
    hard_examples_mining,
)

transparent = _library.or_transparent(
    None, "test_entropy", "(Tensor p, str reduction) -> Tensor", _core.entropy
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@every_loss
def test_compile_without_graph_break(loss, generator):
    compiled = torch.compile(
        lambda *x: loss.first(loss.ours(*[2 * z for z in x])), fullgraph=True, backend="aot_eager"
    )
    inputs = leaves(loss, [x / 2 for x in loss.inputs(generator)], torch.float32)
    expected = run(loss, lambda *x: loss.ours(*[2 * z for z in x]), inputs)
    got = run(loss, compiled, inputs)
    assert_agree(got, expected, torch.float32, 1e-6)


@every_loss
def test_any_number_of_rows(loss, generator):
    """Graphs whose sizes are symbols, which the composites cannot use as numbers."""
    compiled = torch.compile(lambda *x: loss.ours(*x), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 12):
        inputs = leaves(loss, loss.inputs(generator, rows), torch.float32)
        assert_agree(run(loss, compiled, inputs), run(loss, loss.ours, inputs), torch.float32, 1e-6)


@every_loss
def test_windows_of_one_tensor(loss, generator):
    """Offsets, and strides, that become symbols."""
    for cut in (lambda x, k: x[k : k + 7], lambda x, k: x[:7, k : k + 5] if x.dim() == 2 else x[:7]):
        torch._dynamo.reset()

        def call(k, *inputs):
            return loss.ours(*(cut(x, k) for x in inputs))  # noqa: B023

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for k in (0, 3, 6):
            inputs = leaves(loss, loss.inputs(generator, 14, 20 + k), torch.float32)
            got, expected = (run(loss, lambda *x: f(k, *x), inputs) for f in (compiled, call))  # noqa: B023
            assert_agree(got, expected, torch.float32, 1e-6)


@every_loss
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_the_compiler_sees(loss, generator, dynamic):
    """No operator of ours where there is no kernel, unless the sizes are symbols."""
    called = []

    def forward(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    inputs = leaves(loss, loss.inputs(generator), torch.float32)
    compiled = torch.compile(
        lambda *x: loss.ours(*x), fullgraph=True, backend=aot_autograd(fw_compiler=forward), dynamic=dynamic
    )
    run(loss, compiled, inputs)
    ours = [name for name in called if name.startswith("tllib_rs")]
    assert called
    if _core.has_kernels("cpu") or dynamic:
        assert ours
        assert not any("composite" in name for name in ours)
    else:
        assert not ours


def alone(loss, inputs, position):
    """The inputs, of which only the one at ``position`` requires grad."""
    return [x.detach().requires_grad_(k == position) for k, x in enumerate(inputs)]


def differentiable(loss, inputs):
    """The positions of the matrices that the loss is differentiable with respect to."""
    return [k for k, x in enumerate(inputs) if k not in loss.constant and x.dim() == 2]


@every_loss
def test_only_wanted_gradients_are_computed(loss, generator):
    """The gradients in the graphs, seen by their shape, are those of the inputs that require grad. Those of
    distances are in the backward graph."""
    inputs = [x.float() for x in loss.inputs(generator, 7, 5)]
    for position in (None, *differentiable(loss, inputs)):
        stored = []

        def forward(graph, _):
            for node in graph.graph.nodes:
                if str(node.target).startswith("tllib_rs"):
                    outputs = node.meta["val"]
                    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
                    stored.extend(x for x in outputs if x.shape == (7, 5))  # noqa: B023
            return make_boxed_func(graph)

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *x: loss.ours(*x), fullgraph=True, backend=aot_autograd(fw_compiler=forward)
        )
        some = alone(loss, inputs, position)
        if position is None:
            assert_agree(
                (loss.first(compiled(*some)), []), (loss.first(loss.ours(*some)), []), torch.float32, 1e-6
            )
        else:
            assert_agree(run(loss, compiled, some), run(loss, loss.ours, some), torch.float32, 1e-6)
        wanted = 0 if position is None else 1
        assert len(stored) == (wanted if _core.has_kernels("cpu") else 0)


@every_loss
def test_inputs_from_inference_mode(loss, generator):
    """As a teacher's predictions are."""
    inputs = [x.float() for x in loss.inputs(generator)]
    compiled = torch.compile(lambda *x: loss.ours(*x), fullgraph=True, backend="aot_eager")
    for position in differentiable(loss, inputs):
        some = alone(loss, inputs, position)
        with torch.inference_mode():
            others = [x.clone() for x in some]
        # A mask is a factor of the product that torch differentiates, which saves it.
        mixed = [x if k == position or x.dim() == 1 else others[k] for k, x in enumerate(some)]
        # The gradient of distances needs both sides, which torch does not save.
        if loss.name != "pairwise_distances":
            assert_agree(run(loss, compiled, mixed), run(loss, loss.ours, some), torch.float32, 1e-6)


@every_loss
def test_wrong_types_raise_as_without(loss, generator):
    inputs = [x.float() for x in loss.inputs(generator)]
    inputs[loss.differentiated] = inputs[loss.differentiated].long()
    with pytest.raises(TypeError) as expected:
        loss.ours(*inputs)
    compiled = torch.compile(lambda *x: loss.ours(*x), fullgraph=True, backend="aot_eager")
    with pytest.raises(TypeError) as got:
        compiled(*inputs)
    assert str(got.value) == str(expected.value)


#: The losses that take inputs of two dtypes.
MIXED = "pseudo_label dst cc_loss pi_model pi_model_none pi_model_mask uda soft_triplet reid_cross_entropy"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name in MIXED.split()], ids=repr)
def test_compile_without_a_kernel(loss, generator):
    """The path for inputs of two dtypes here, and for all inputs on devices without kernels."""
    for first, second in ((torch.float32, torch.float64), (torch.float16, torch.float32)):
        inputs = leaves(loss, loss.inputs(generator), first)
        inputs[1] = inputs[1].detach().to(second).requires_grad_(inputs[1].requires_grad)
        promised = []

        def backend(graph, _):
            [output] = graph.graph.find_nodes(op="output")
            promised.append(output.args[0][0].meta["example_value"].dtype)  # noqa: B023
            return graph

        torch._dynamo.reset()
        torch.compile(lambda *x: (loss.first(loss.ours(*x)),), fullgraph=True, backend=backend)(*inputs)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *x: loss.first(loss.ours(*x)), fullgraph=True, backend="aot_eager")
        got, expected = run(loss, compiled, inputs), run(loss, loss.ours, inputs)
        assert promised == [expected[0].dtype] == [got[0].dtype]
        assert_agree(got, expected, first, 1e-6 if first == torch.float32 else 2e-3)


@every_loss
def test_autocast_compiled(loss, generator):
    inputs = [x.bfloat16() for x in loss.inputs(generator, 16, 10)]

    def in_region(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss.first(loss.ours(*x))

    compiled = torch.compile(in_region, fullgraph=True, backend="aot_eager")
    got, expected = (run(loss, f, leaves(loss, inputs, torch.bfloat16)) for f in (compiled, in_region))
    assert got[0].dtype == expected[0].dtype
    assert_agree((got[0], []), (expected[0], []), torch.bfloat16, 1e-6)
    # The gradient stored in bfloat16 is multiplied by the incoming one, and rounded again.
    assert_agree(got, expected, torch.bfloat16, 8e-3)


@contextmanager
def region_of_cuda(dtype):
    """Like ``torch.autocast("cuda", dtype)``, which needs a device."""
    torch.set_autocast_enabled("cuda", True)
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cuda", before)
        torch.set_autocast_enabled("cuda", False)


#: Losses whose plain formulation waits for the device, is refused in the region, or differs there from tllib,
#: which raises for features in half precision.
OTHERWISE = "cc_loss class_balance pairwise_distances"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name not in OTHERWISE.split()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("region", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_in_a_region_of_cuda(loss, dtype, region, generator):
    """The dtype that the compiler is told, which needs no device."""
    inputs = leaves(loss, loss.inputs(generator), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), region_of_cuda(region):
        fake = [torch.empty_like(x, device="cuda", requires_grad=x.requires_grad) for x in inputs]
        got, expected = (loss.first(call(*fake)) for call in (loss.ours, loss.plain))
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    assert got.requires_grad


def test_graphs_that_torch_keeps_on_the_disk_are_told_apart_by_the_build(monkeypatch, tmp_path):
    """torch finds them by the operators in them, and does not know what ours is composed of."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_core, "has_kernels", lambda device: False)
    found = []
    for build in ("one", "two", "two"):
        monkeypatch.setattr(_library, "_BUILD", build)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x = torch.rand(2, 3, requires_grad=True)
        torch.compile(lambda x: transparent(x, "none"), fullgraph=True)(x).sum().backward()
        found.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert found == [0, 0, 1]


#: The losses whose gradients a large batch makes small.
LARGE = "mcc pseudo_label dst class_balance entropy_mean pi_model uda reid_cross_entropy label_smooth"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name in LARGE.split()], ids=repr)
def test_float16_gradients_of_a_large_batch_keep_their_digits(loss, generator):
    """The loss scale is applied before rounding, as in eager mode: float16 has few values this small."""

    def scaled(*x):
        return loss.first(loss.ours(*x)).float() * 2.0**12

    inputs = leaves(loss, loss.inputs(generator, 20_000, 5), torch.float16)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    (_, got), (_, expected) = (run(loss, call, inputs, 1.0) for call in (compiled, scaled))
    for ours, eager in zip(got, expected, strict=True):
        if ours is not None:
            assert (eager != 0).float().mean() > 0.5
            torch.testing.assert_close(ours, eager, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "triplet" in loss.name], ids=repr)
def test_inductor_mines_with_strided_labels(loss, generator):
    """It gets argmax wrong on the CPU when it fuses it with a mask computed from strided labels."""
    labels = torch.arange(32).repeat_interleave(2)[::2] // 4

    def call(x):
        if "xbm" in loss.name:
            return loss.module(x, labels, x.flip(0), labels.flip(0))
        return loss.module(x, x.sin(), labels) if "soft" in loss.name else loss.module(x, labels)

    inputs = [torch.randn(32, 8, generator=generator, requires_grad=True)]
    got, expected = (run(loss, f, inputs) for f in (torch.compile(call), call))
    assert_agree(got, expected, torch.float32, 1e-5)


def test_inductor_mines_a_matrix_that_it_masks(generator):
    def call(distances, labels):
        same = labels.unsqueeze(1).eq(labels.unsqueeze(0)).float()
        return hard_examples_mining(distances, same, return_idxes=True)

    distances = torch.rand(16, 16, generator=generator)
    labels = torch.randint(3, (32,), generator=generator)[::2]
    for ours, eager in zip(torch.compile(call)(distances, labels), call(distances, labels), strict=True):
        assert torch.equal(ours, eager)


LOGITS, FEATURES = (9, 5), (9, 4)
#: A module, the number that a schedule changes, and the shapes of its inputs (``None`` for labels).
VARIED = {
    "mcc": (MinimumClassConfusionLoss(1.0), "temperature", [LOGITS]),
    "pseudo_label": (ConfidenceBasedSelfTrainingLoss(0.5), "threshold", [LOGITS, LOGITS]),
    "uda": (StrongWeakConsistencyLoss(0.3, 1.0), "threshold", [LOGITS, LOGITS]),
    "cc_loss": (CCConsistency(1.0, 0.3), "temperature", [LOGITS, LOGITS]),
    "dst": (WorstCaseEstimationLoss(1.0), "eta_prime", [LOGITS] * 4),
    "triplet": (TripletLoss(1.0), "margin_loss.margin", [FEATURES, None]),
    "soft_triplet": (SoftTripletLoss(1.0), "margin", [FEATURES, FEATURES, None]),
    "label_smooth": (CrossEntropyLossWithLabelSmooth(5, 0.1), "epsilon", [LOGITS, None]),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", VARIED)
def test_a_number_that_changes_is_compiled_for_once(name, backend, generator):
    """As a schedule changes a threshold or a temperature: a graph for the first value, and one for all others."""
    module, attribute, shapes = VARIED[name]
    module = copy.deepcopy(module)

    def call(*x):
        found = module(*x)
        return found[0] if isinstance(found, tuple) else found

    inputs = [
        torch.arange(9) // 3 if shape is None else torch.randn(shape, generator=generator) for shape in shapes
    ]
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    # Operators that take a number as a tensor are in no CUDA graph, which would replay the first one.
    operator = getattr(torch.ops.tllib_rs, f"{name}_of_tensors").default
    assert torch.Tag.cudagraph_unsafe in operator.tags
    *owner, attribute = attribute.split(".")
    owner = module.get_submodule(".".join(owner))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for step in range(12):
        setattr(owner, attribute, 0.2 + 0.05 * step)
        value, expected = compiled(*inputs), call(*inputs)
        torch.testing.assert_close(value.detach(), expected.detach())
        grads = [torch.autograd.grad(x, wanted, materialize_grads=True) for x in (value, expected)]
        torch.testing.assert_close(*grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_number_that_changes_stays_on_the_cpu(generator):
    """Also where new tensors go elsewhere by default."""
    loss, logits = MinimumClassConfusionLoss(1.0), torch.randn(LOGITS, generator=generator)
    compiled = torch.compile(lambda z: loss(z), backend="aot_eager")
    with torch.device("meta"):
        for temperature in (0.3, 0.4, 0.5):
            loss.temperature = temperature
            assert torch.equal(compiled(logits), loss(logits))
