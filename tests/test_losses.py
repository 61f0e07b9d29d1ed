"""Properties that every loss has: the dtypes, layouts, transforms and gradients of the design."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.losses import LOSSES, Observed
from tests.on_device import EMULATED
from tests.threads import threads_of
from tllib_rs import _core
from tllib_rs.modules.entropy import entropy
from tllib_rs.vision.models.reid.loss import pairwise_euclidean_distance

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
HALF = [torch.float16, torch.bfloat16]


def leaves(loss, inputs, dtype=torch.float64):
    """Copies of the inputs in ``dtype``; those that the loss differentiates require a gradient."""
    out = [x.detach().to(dtype) if x.is_floating_point() else x for x in inputs]
    for k, x in enumerate(out):
        if k not in loss.constant and x.is_floating_point():
            out[k] = x.clone().requires_grad_()
    return out


def differentiated(loss):
    """The positions of the inputs that the loss is differentiated with respect to."""
    inputs = loss.inputs(torch.Generator())
    return [k for k, x in enumerate(inputs) if x.is_floating_point() and k not in loss.constant]


def run(loss, call, inputs, weight=0.37):
    """The value of the loss, and the gradients of ``weight`` times it."""
    value = loss.first(call(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    return value.detach(), torch.autograd.grad((weight * value).sum(), wanted)


def assert_agree(got, expected, dtype, rtol):
    """Values and gradients, by the largest error over the largest reference."""
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        error = (a.double() - b.double()).abs().max() if b.numel() else torch.tensor(0.0)
        # A gradient that is zero in exact arithmetic is rounding noise in both.
        scale = max(float(b.double().abs().max()), 1e-4) if b.numel() else 1.0
        assert error <= rtol * scale, (dtype, error)


@every_loss
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 11), (64, 100), (3, 1031), (257, 5)], ids=str)
def test_awkward_shapes(loss, generator, shape):
    inputs = loss.inputs(generator, *shape)
    expected = run(loss, loss.plain, leaves(loss, inputs))
    assert_agree(run(loss, loss.ours, leaves(loss, inputs)), expected, torch.float64, 1e-10)


@every_loss
@pytest.mark.parametrize("shape", [(5, 7), (7, 2), (13, 11), (3, 1031)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_composites(loss, generator, shape, dtype, rtol):
    inputs = [x.to(dtype).double() if x.is_floating_point() else x for x in loss.inputs(generator, *shape)]
    expected = run(loss, loss.plain, leaves(loss, inputs))
    with Observed():
        got = run(loss, loss.ours, leaves(loss, inputs, dtype))
    assert_agree(got, expected, dtype, rtol)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_dtypes(loss, generator, dtype):
    # Inputs rounded to the type under test, so that only the computation differs.
    inputs = [x.to(dtype).double() if x.is_floating_point() else x for x in loss.inputs(generator, 64, 31)]
    expected = run(loss, loss.plain, leaves(loss, inputs))
    typed = leaves(loss, inputs, dtype)
    got = run(loss, loss.ours, typed)
    assert all(g.dtype == x.dtype for g, x in zip(got[1], [x for x in typed if x.requires_grad], strict=True))
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    if dtype == torch.float32:
        own = run(loss, loss.plain, leaves(loss, inputs, dtype))
        error = max(
            float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))
            for a, b in zip([own[0], *own[1]], [expected[0], *expected[1]], strict=True)
        )
        rounding = max(rounding, 4 * error)
    assert_agree(got, expected, dtype, rounding)


@every_loss
@pytest.mark.parametrize("shape", [(6, 9), (40, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_layouts(loss, generator, dtype, shape):
    inputs = [x.to(dtype) for x in loss.inputs(generator, *shape)]
    expected = run(loss, loss.ours, leaves(loss, inputs, dtype))

    def transposed(x):
        return x.t().contiguous().t()

    def offset(x):
        padded = torch.full((x.shape[0] + 2, x.shape[1] + 3), 7.0, dtype=x.dtype)
        padded[1:-1, 2:-1] = x
        return padded[1:-1, 2:-1]

    def sliced(x):
        wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), 7.0, dtype=x.dtype)
        wide[::2, ::3] = x
        return wide[::2, ::3]

    for layout in (transposed, offset, sliced):
        laid = [layout(x.detach()) if x.dim() == 2 else x.detach() for x in inputs]
        for k, x in enumerate(laid):
            x.requires_grad_(k not in loss.constant and x.is_floating_point())
        got = run(loss, loss.ours, laid)
        assert_agree(got, expected, dtype, 1e-6 if dtype == torch.float32 else 1e-12)


@every_loss
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)], ids=str)
def test_any_stride_where_it_does_not_matter(loss, generator, shape):
    """torch considers a tensor contiguous whatever the stride of a dimension of size 1."""
    inputs = leaves(loss, loss.inputs(generator, *shape))
    expected = run(loss, loss.ours, inputs)
    laid = []
    for x in inputs:
        strides = [29 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
        y = torch.full((99,), 7.0, dtype=x.dtype).as_strided(x.shape, strides, 3)
        laid.append(y.copy_(x.detach()).requires_grad_(x.requires_grad))
        assert y.is_contiguous()
    assert_agree(run(loss, loss.ours, laid), expected, torch.float64, 1e-12)


@every_loss
def test_expanded_rows(loss, generator):
    row = [x[:1] if x.dim() == 2 else x for x in loss.inputs(generator, 1, 9)]
    if any(x.dim() != 2 for x in row):
        row = [x.expand(5, 9) if x.dim() == 2 else x.expand(5) for x in row]
    expanded = [x.expand(5, *x.shape[1:]) for x in row]
    value = loss.first(loss.ours(*expanded))
    expected = loss.first(loss.plain(*[x.contiguous() for x in expanded]))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@every_loss
def test_empty_batch_as_in_the_plain_formulation(loss, generator):
    inputs = leaves(loss, loss.inputs(generator, 0, 5))
    if loss.empty is ValueError:
        with pytest.raises(ValueError, match="must hold at least one row"):
            loss.ours(*inputs)
        return
    got = torch.as_tensor(loss.first(loss.ours(*inputs)))
    if loss.empty is not None:
        expected = torch.tensor(loss.empty, dtype=got.dtype)
    else:
        expected = torch.as_tensor(loss.first(loss.plain(*inputs)))
    torch.testing.assert_close(got.detach(), expected.detach(), equal_nan=True)


@every_loss
def test_nan_stays_nan(loss, generator):
    inputs = leaves(loss, loss.inputs(generator, 6, 5))
    with torch.no_grad():
        poisoned = inputs[loss.differentiated]
        poisoned[2, 3] = torch.nan
    value = loss.first(loss.ours(*inputs))
    assert value.isnan().any()
    value.sum().backward()
    assert poisoned.grad.isnan().any()


@every_loss
def test_gradcheck(loss, generator):
    inputs = leaves(loss, loss.inputs(generator, 5, 4))

    def call(*x):
        return loss.first(loss.ours(*x))

    if loss.gradcheck:
        assert torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, inputs)
    # Where part of the formula is held constant, the plain formulation holds it too.
    ours = run_twice(call, inputs)
    plain = run_twice(lambda *x: loss.first(loss.plain(*x)), inputs)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def run_twice(call, inputs):
    """First derivatives under create_graph, and derivatives of their squares."""
    wanted = [x for x in inputs if x.requires_grad]
    first = torch.autograd.grad(call(*inputs).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    return [*[g.detach() for g in first], *[torch.zeros(()) if g is None else g for g in second]]


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("loss", [x for x in LOSSES if len(differentiated(x)) > 1], ids=repr)
def test_inputs_that_are_one_tensor_or_come_from_it(loss, generator, computed):
    inputs = loss.inputs(generator)
    first, *others = differentiated(loss)

    def through(call):
        def of_one(x):
            arguments = [*inputs]
            arguments[first] = x
            for k in others:
                other = x.square() if computed else x
                arguments[k] = other if inputs[k].dim() == x.dim() else other.amax(1)
            return loss.first(call(*arguments))

        return run_twice(of_one, [inputs[first].clone().requires_grad_()])

    for a, b in zip(through(loss.ours), through(loss.plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@every_loss
def test_backward_twice_accumulation_and_release(loss, generator):
    inputs = leaves(loss, loss.inputs(generator))
    _, grads = run(loss, loss.ours, inputs, weight=1.0)
    wanted = [x for x in inputs if x.requires_grad]
    value = loss.first(loss.ours(*inputs)).sum()
    kept = torch.autograd.grad(value, wanted, retain_graph=True)
    for g in kept:
        g.mul_(100)  # what a user does to a gradient must not reach the graph
    value.backward(retain_graph=True)
    value.backward()
    for x, g in zip(wanted, grads, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@every_loss
def test_a_pass_that_fails_behind_the_loss_loses_nothing_in_silence(loss, generator):
    """Our node has moved its gradients out by then, and says so; torch's own, of a composite, keep theirs."""

    def fails(*_):
        raise KeyError("behind the loss")

    inputs = leaves(loss, loss.inputs(generator))
    expected = run(loss, loss.ours, inputs, weight=1.0)
    output = loss.first(loss.ours(*inputs))
    hook = output.grad_fn.register_hook(fails)
    with pytest.raises(KeyError, match="behind the loss"):
        output.sum().backward()
    hook.remove()
    if not output.grad_fn.name().endswith("0"):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.sum().backward()
        return
    output.sum().backward()
    grads = [x.grad for x in inputs if x.requires_grad]
    assert_agree((expected[0], grads), expected, torch.float64, 1e-12)


@every_loss
def test_no_grad(loss, generator):
    inputs = leaves(loss, loss.inputs(generator))
    expected = loss.first(loss.ours(*inputs)).detach()
    with torch.no_grad():
        value = loss.first(loss.ours(*inputs))
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)
    with torch.inference_mode():
        torch.testing.assert_close(loss.first(loss.ours(*inputs)), expected)


@pytest.mark.parametrize("loss", [x for x in LOSSES if len(differentiated(x)) > 1], ids=repr)
def test_one_input_alone_wants_a_gradient(loss, generator):
    inputs = leaves(loss, loss.inputs(generator))
    _, expected = run(loss, loss.ours, inputs)
    for k, right in zip(differentiated(loss), expected, strict=True):
        only = [x.detach() for x in inputs]
        only[k].requires_grad_()
        _, (got,) = run(loss, loss.ours, only)
        torch.testing.assert_close(got, right, rtol=1e-12, atol=0)


@every_loss
def test_elements_that_begin_anywhere_in_memory(loss, generator):
    """As from torch.frombuffer of a file with a header."""

    def moved(x):
        raw = bytearray(1) + bytearray(x.numpy().tobytes())
        return torch.frombuffer(raw, dtype=x.dtype, offset=1).view(x.shape)

    inputs = leaves(loss, loss.inputs(generator))
    expected = run(loss, loss.ours, inputs)
    unaligned = [moved(x.detach()).requires_grad_(x.requires_grad) for x in inputs]
    assert all(x.data_ptr() % x.element_size() for x in unaligned)
    torch.testing.assert_close(run(loss, loss.ours, unaligned), expected)


@every_loss
def test_an_input_changed_before_create_graph_is_noticed(loss, generator):
    inputs = leaves(loss, loss.inputs(generator))
    middle = [x * 1 if x.requires_grad else x for x in inputs]
    value = loss.first(loss.ours(*middle)).sum()
    with torch.no_grad():
        next(x for x in middle if x.requires_grad).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, [x for x in inputs if x.requires_grad], create_graph=True)


@every_loss
def test_func_transforms(loss, generator):
    inputs = [x.detach() for x in loss.inputs(generator, 4, 3)]
    where = tuple(k for k in range(len(inputs)) if k not in loss.constant)

    def ours(*x):
        return loss.first(loss.ours(*x)).sum()

    def plain(*x):
        return loss.first(loss.plain(*x)).sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(
            transform(ours, argnums=where)(*inputs), transform(plain, argnums=where)(*inputs)
        )
    batch = [torch.stack([x, x.flip(0), x * 0.5]) for x in inputs]
    expected = torch.stack([loss.first(loss.ours(*x)) for x in zip(*batch, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda *x: loss.first(loss.ours(*x)))(*batch), expected)


@every_loss
def test_constants_under_func_transforms(loss, generator):
    inputs = [x.detach() for x in loss.inputs(generator, 4, 3)]
    weight = torch.tensor(2.0, dtype=torch.float64)

    def weighted(weight):
        return (weight * loss.first(loss.ours(*inputs))).sum()

    expected = loss.first(loss.ours(*inputs)).sum()
    torch.testing.assert_close(torch.func.grad(weighted)(weight), expected)
    torch.testing.assert_close(torch.func.jvp(weighted, (weight,), (weight,)), (2 * expected, 2 * expected))
    torch.testing.assert_close(torch.vmap(weighted)(weight[None]), 2 * expected[None])


#: The losses that read contiguous columns as such.
BY_COLUMNS = "entropy entropy_mean pi_model pi_model_none pi_model_mask class_balance"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name in BY_COLUMNS.split()], ids=repr)
@pytest.mark.parametrize("shape", [(16, 5), (45, 45), (33, 70), (15, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_columns_in_one_piece(loss, generator, shape, dtype):
    """Gradients are laid out like the inputs, whatever the incoming gradient."""
    inputs = [x.to(dtype) for x in loss.inputs(generator, *shape)]
    columns = [x.t().contiguous().t() if x.dim() == 2 else x for x in inputs]
    value = loss.first(loss.ours(*inputs))
    weights = [0.37, torch.rand(value.shape, generator=generator, dtype=torch.float64)]
    for weight in weights if value.dim() else weights[:1]:
        got, expected = (run(loss, loss.ours, leaves(loss, x, dtype), weight) for x in (columns, inputs))
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        assert_agree(got, expected, dtype, tolerance)
        if _core.has_kernels("cpu") and shape[0] > 15 and not EMULATED:
            assert all(g.stride() == x.stride() for g, x in zip(got[1], columns, strict=False))
    kept = leaves(loss, columns, dtype)
    loss.first(loss.ours(*kept)).sum().backward(retain_graph=True)
    loss.first(loss.ours(*kept)).sum().backward()
    assert all(x.grad.stride() == x.stride() for x in kept if x.requires_grad)


#: The losses that take any number of dimensions, with classes along dimension 1.
ANY_SHAPE = "entropy entropy_mean pi_model pi_model_none reid_cross_entropy pseudo_label uda dst"


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name in ANY_SHAPE.split()], ids=repr)
@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 9), (1, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_more_than_two_dimensions(loss, generator, compiled, shape):
    rows = torch.Size(shape).numel()
    images = [x.reshape(*shape, 5).transpose(1, -1) for x in loss.inputs(generator, rows, 5)]
    each = loss.name in ("entropy", "pi_model_none")
    weight = torch.rand(images[0][:, 0].shape, generator=generator, dtype=torch.float64) if each else 0.37
    torch._dynamo.reset()
    call = torch.compile(loss.ours, fullgraph=True, backend="aot_eager") if compiled else loss.ours
    expected = run(loss, loss.plain, leaves(loss, images), weight)
    assert_agree(run(loss, call, leaves(loss, images), weight), expected, torch.float64, 1e-10)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(loss, generator, dtype):
    # Rounded to what autocast would compute in: its region must not cost more precision than that.
    inputs = [x.bfloat16().double() for x in loss.inputs(generator, 16, 10)]
    expected = run(loss, loss.plain, leaves(loss, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(loss, loss.ours, leaves(loss, inputs, dtype))
    assert_agree((got[0], []), (expected[0], []), dtype, 2e-6 if got[0].dtype == torch.float32 else 8e-3)
    assert_agree((got[0], got[1]), (got[0], expected[1]), dtype, 2e-5 if dtype == torch.float32 else 1.6e-2)


@every_loss
def test_copies(loss, generator):
    """Of what users copy or save: the modules themselves, wherever the tested call keeps them."""
    inputs = loss.inputs(generator)
    expected = loss.first(loss.ours(*inputs))
    if loss.module is None:
        assert not isinstance(loss.ours, torch.nn.Module)
        # The only ones that are functions.
        function = entropy if loss.name.startswith("entropy") else pairwise_euclidean_distance
        assert pickle.loads(pickle.dumps(function)) is function
        assert loss.name.startswith(("entropy", "pairwise"))
        return
    file = io.BytesIO()
    torch.save(loss.module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(loss.module),
        pickle.loads(pickle.dumps(loss.module)),
        torch.load(file, weights_only=False),
    ):
        assert repr(other) == repr(loss.module)
        assert not other.state_dict()
        call = other if loss.ours is loss.module else loss.through(other)
        torch.testing.assert_close(loss.first(call(*inputs)), expected)


@every_loss
def test_meta_device(loss, generator):
    inputs = loss.inputs(generator)
    value = loss.first(loss.ours(*leaves(loss, [x.to("meta") for x in inputs])))
    assert value.device.type == "meta"
    assert value.shape == loss.first(loss.plain(*inputs)).shape


@every_loss
def test_several_python_threads(loss, generator):
    problems = [leaves(loss, loss.inputs(generator, 40, 500)) for _ in range(8)]
    expected = [run(loss, loss.ours, x) for x in problems]
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(
            pool.map(lambda x: run(loss, loss.ours, x), problems * 4), expected * 4, strict=True
        ):
            assert torch.equal(got[0], right[0])
            assert all(torch.equal(a, b) for a, b in zip(got[1], right[1], strict=True))


@every_loss
def test_thread_count_does_not_matter(loss, generator):
    inputs = leaves(loss, loss.inputs(generator, 512, 400), torch.float32)
    results = []
    for threads in (1, 3):
        with threads_of(threads):
            results.append(run(loss, loss.ours, inputs))
    assert_agree(results[0], results[1], torch.float32, 1e-6)
