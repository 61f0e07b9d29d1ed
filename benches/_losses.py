"""Cases of losses over (minibatch, C) logits: forward and backward."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from benches._case import LIMIT, Case, Provider

SMALL = [(32, 31), (64, 100)]
SHAPES = [*SMALL, (256, 1000), (1024, 1000)]

#: Makes the inputs of a loss from (generator, rows, classes). The first one is differentiated.
Inputs = Callable[[torch.Generator, int, int], tuple[torch.Tensor, ...]]


def logits(generator: torch.Generator, rows: int, classes: int) -> tuple[torch.Tensor, ...]:
    """One matrix of logits."""
    return (3 * torch.randn(rows, classes, generator=generator),)


def loss_case(
    rows: int,
    classes: int,
    losses: Mapping[str, Callable | None],
    inputs: Inputs = logits,
    bars: Mapping[str, float] | None = None,
) -> Case:
    """A training step of each of ``losses`` (those that are there), and of ``F.cross_entropy`` as limit."""

    def set_up():
        generator = torch.Generator().manual_seed(0)
        tensors = inputs(generator, rows, classes)
        labels = torch.randint(classes, (rows,), generator=generator)
        providers = {name: _provider(loss, tensors) for name, loss in losses.items() if loss is not None}
        limit = _provider(lambda y, *_: F.cross_entropy(y, labels), tensors)
        return providers | {LIMIT: Provider(limit.step, None)}

    shape = (rows, classes)
    return Case(str(shape), set_up, bars, quick=rows * classes < 1 << 18, small=shape in SMALL)


def _provider(loss: Callable, tensors: tuple[torch.Tensor, ...]) -> Provider:
    leaf = tensors[0].clone().requires_grad_()
    others = tensors[1:]

    def step():
        leaf.grad = None
        outputs = loss(leaf, *others)
        scalar = outputs[0] if isinstance(outputs, tuple) else outputs
        scalar.backward()
        return outputs

    def result():
        outputs = step()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*(x.detach().clone() for x in outputs), leaf.grad.clone()]

    return Provider(step, result)
