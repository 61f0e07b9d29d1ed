"""Derivatives of compiled and exported losses beyond the gradient: an opaque operator has none of its own,
and a wrong one would silently be 0."""

import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from tests.losses import LOSSES
from tests.test_losses import differentiated, every_loss
from tllib_rs import _library
from tllib_rs.self_training.mcc import MinimumClassConfusionLoss
from tllib_rs.vision.models.reid.loss import pairwise_euclidean_distance

TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 0.9 * x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda z: f(z).sum()))(torch.stack([x, 0.9 * x])),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def of_one(loss, generator):
    """The loss as a function of the first input that is differentiated, and that input."""
    inputs = loss.inputs(generator)
    place = differentiated(loss)[0]

    def function(x):
        return loss.first(loss.ours(*inputs[:place], x, *inputs[place + 1 :]))

    return function, inputs[place].detach()


def assert_close(got, expected):
    torch.testing.assert_close(tree_leaves(got), tree_leaves(expected), rtol=1e-6, atol=1e-9)


@every_loss
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(loss, transform, generator):
    function, x = of_one(loss, generator)
    transform = TRANSFORMS[transform]
    compiled = torch.compile(lambda x: transform(function, x), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), transform(function, x))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_batches_of_other_sizes(transform, dynamic, generator):
    transform, loss = TRANSFORMS[transform], MinimumClassConfusionLoss(2.0)
    compiled = torch.compile(lambda x: transform(loss, x), backend="aot_eager", dynamic=dynamic)
    for rows in (8, 5, 6):
        x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        assert_close(compiled(x), transform(loss, x))


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def compiled(function, x):
    return torch.compile(function, backend="eager", fullgraph=True)


def exported(function, x):
    return torch.export.export(Exported(function), (x,)).module()


graphs = pytest.mark.parametrize("graph", [compiled, exported])


#: Whose gradient needs them: distances, and a product with a mask.
KEEP_INPUTS = ("pairwise_distances", "pi_model_mask")


@every_loss
@graphs
def test_forward_mode(loss, graph, generator):
    function, x = of_one(loss, generator)
    _, expected = torch.func.jvp(function, (x,), (x.cos(),))
    kept = graph(function, x)
    if graph is exported:
        # Dynamo itself does not accept tensors of a transform that began outside.
        assert_close(torch.func.jvp(kept, (x,), (x.cos(),))[1], expected)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(kept(forward_ad.make_dual(x, x.cos()))).tangent
    assert_close(got, expected)


@every_loss
@graphs
def test_second_derivatives(loss, graph, generator):
    function, x = of_one(loss, generator)
    kept = graph(function, x)

    def penalty(f):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)

    assert_close(penalty(kept), penalty(function))


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.name not in KEEP_INPUTS], ids=repr)
def test_inputs_may_be_written_to_after_the_loss(loss, generator):
    """The gradient was computed with the loss. A second derivative does need the inputs, and raises."""
    inputs = [x.detach().clone() for x in loss.inputs(generator)]
    place = differentiated(loss)[0]

    def step(x, *others):
        middle = x * 1
        value = loss.first(loss.ours(*others[:place], middle, *others[place:])).sum()
        for z in (middle, *others):
            z.detach().mul_(2)
        return value

    def gradient(f, **options):
        x = inputs[place].clone().requires_grad_()
        others = [z.clone() for k, z in enumerate(inputs) if k != place]
        return torch.autograd.grad(f(x, *others), x, **options)

    expected = gradient(step)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        assert_close(gradient(torch.compile(step, backend=backend, fullgraph=True)), expected)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(torch.compile(step, backend="eager", fullgraph=True), create_graph=True)


def test_two_inputs_that_are_one(generator):
    """Each derivative is with respect to its own argument alone."""
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)

    def twice(call, z):
        (grad,) = torch.autograd.grad(call(z, z).sum(), z, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), z)

    def distances(x, y):
        return pairwise_euclidean_distance(x, 2 * y)

    graph = torch.compile(distances, backend="eager", fullgraph=True)
    assert_close(twice(graph, x.clone().requires_grad_()), twice(distances, x.clone().requires_grad_()))


def test_an_operator_whose_inputs_are_not_kept_refuses(generator):
    _library.define("test_cube", "(Tensor x) -> Tensor", lambda x: x.detach() ** 3, torch.empty_like)
    _library.differentiate(
        "test_cube",
        lambda ctx, kept, incoming: (incoming * 3 * kept[0] ** 2,),
        lambda ctx, inputs, output: inputs,
        composed=None,
    )
    cube = torch.ops.tllib_rs.test_cube
    x = torch.randn(3, generator=generator, requires_grad=True)
    (grad,) = torch.autograd.grad(cube(x).sum(), x)
    torch.testing.assert_close(grad, 3 * x.detach() ** 2)
    with pytest.raises(RuntimeError, match="test_cube: this operator has a gradient"):
        torch.autograd.grad(cube(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no other derivative"):
        torch.func.jvp(cube, (x.detach(),), (x.detach(),))


def test_a_second_pass_through_a_graph_that_was_not_kept(generator):
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    loss = torch.compile(MinimumClassConfusionLoss(2.0), backend="eager")(logits)
    torch.autograd.grad(loss, logits)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, logits, create_graph=create_graph)


# Of the compiler, which looks at every input's gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_inputs_are_released_by_the_backward_pass(generator):
    """As what torch saves: the loss itself may be kept for a log."""
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    middle = logits * 1
    released = weakref.ref(middle)
    loss = torch.compile(MinimumClassConfusionLoss(2.0), backend="eager")(middle)
    loss = loss + 0
    del middle
    torch.autograd.grad(loss, logits, retain_graph=True)
    assert released() is not None
    torch.autograd.grad(loss, logits)
    assert released() is None
