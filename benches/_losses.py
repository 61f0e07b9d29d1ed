"""Cases of losses over (minibatch, C) matrices: forward and backward."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.nn import functional as F

from benches._case import (
    COMPILED,
    COPY,
    LIMIT,
    OURS,
    PLAIN,
    TOLERANCE,
    Bar,
    Case,
    Footprint,
    Provider,
    faster,
    seeded,
    within,
)
from benches._providers import compiled

SMALL = [(32, 31), (64, 100)]
SHAPES = [
    *SMALL,
    (4096, 10),
    (4096, 64),
    (32, 345),
    (448, 100),
    (256, 1000),
    (1024, 1000),
    (8, 100_000),
]
#: Additional shapes on a device.
DEVICE_SHAPES = [(4096, 1000), (65_536, 1000)]
#: Inductor takes ten seconds for each; on a device all are compiled.
COMPILED_SHAPES = [(32, 31), (256, 1000)]
#: Where memory is judged: large enough that a gradient is much more than what else a process allocates.
LARGE = (1024, 8192)
#: Formulas with C x C matrices are run up to this many classes.
MATRIX = 10_000
#: Settings drawn at random have fewer, or plain would take all the time.
FEW_CLASSES = (16_384, 2048)
#: How many times faster than plain a row loss has to be at the small shapes.
SMALL_BAR = 1.5


CONTIGUOUS, SLICE, TRANSPOSED = LAYOUTS = ["contiguous", "slice of columns", "transposed"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A setting of ours and plain alone: not contiguous float32 with a gradient, or drawn at random."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    #: Of :data:`LAYOUTS`.
    layout: str = CONTIGUOUS
    gradient: bool = True
    #: What :func:`benches._case.check` accepts: plain rounds every step to a half type.
    tolerance: float = TOLERANCE

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in this setting; labels stay as they are."""
        if not x.is_floating_point():
            return x
        x = x.to(self.dtype)
        if x.dim() == 1:
            return x
        if self.layout == SLICE:
            # Of a matrix three times as wide.
            return x.repeat(1, 3)[:, : x.shape[1]]
        return x.T.contiguous().T if self.layout == TRANSPOSED else x


#: Half types where rows are long and short, what an evaluation does, and a slice.
VARIANTS = [
    Variant("bfloat16", (256, 1000), torch.bfloat16, tolerance=5e-2),
    Variant("float16", (64, 100), torch.float16, tolerance=2e-2),
    Variant("float64", (448, 100), torch.float64),
    Variant(SLICE, (4096, 10), layout=SLICE),
    Variant("no gradient", (4096, 10), gradient=False),
]

#: Makes the inputs of a loss from (generator, rows, classes).
Inputs = Callable[[torch.Generator, int, int], Sequence[torch.Tensor]]
#: The loss of each provider for a number of classes; ``None`` for a provider that is not there.
Losses = Callable[[int], Mapping[str, Callable | None]]


def logits(count: int) -> Inputs:
    """``count`` matrices of logits."""
    return lambda generator, rows, classes: tuple(
        3 * torch.randn(rows, classes, generator=generator) for _ in range(count)
    )


#: One matrix of logits.
ONE = logits(1)


def probabilities(count: int) -> Inputs:
    """``count`` matrices whose rows sum to 1."""
    return lambda *size: tuple(z.softmax(dim=1) for z in logits(count)(*size))


def half_confident(generator: torch.Generator, rows: int, classes: int) -> tuple[torch.Tensor, ...]:
    """Logits, and others of which every second row is certain of one class: rows that are not selected
    cost less."""
    y, target = logits(2)(generator, rows, classes)
    target[::2, 0] = 40
    return y, target


def loss_cases(
    losses: Losses,
    inputs: Inputs = ONE,
    *,
    loss: str = "",
    limit: float | None = None,
    bars: Mapping[tuple[int, int], Sequence[Bar]] | None = None,
    differentiated: Sequence[int] = (0,),
    tolerances: Mapping[str, float] | None = None,
    variants: Sequence[Variant] = VARIANTS,
) -> list[Case]:
    """A case for each of :data:`SHAPES`, :data:`DEVICE_SHAPES` and ``variants``. ``limit``: at most how
    many times as long as the limit ours may take; at the small shapes :data:`SMALL_BAR` applies, and ``bars``
    come on top."""

    def case(shape):
        found = [within(LIMIT, limit)] if limit else []
        if shape in SMALL:
            found.append(faster(PLAIN, SMALL_BAR))
        found += (bars or {}).get(shape, ())
        case = loss_case(
            *shape, losses(shape[1]), inputs, bars=found, loss=loss, differentiated=differentiated
        )
        return dataclasses.replace(case, tolerances=tolerances or {}, on_device=shape in DEVICE_SHAPES)

    def variant(kind):
        tolerance = max(kind.tolerance, (tolerances or {}).get(OURS, 0))
        return variant_case(kind, losses(kind.shape[1]), inputs, tolerance, loss, differentiated)

    return [*map(case, SHAPES + DEVICE_SHAPES), *map(variant, variants)]


def variant_case(
    variant: Variant,
    losses: Mapping[str, Callable | None],
    inputs: Inputs,
    tolerance: float,
    loss: str,
    differentiated: Sequence[int],
) -> Case:
    """A training step of ours and of the plain formulation, or the forward pass alone."""

    def set_up():
        tensors = [variant.of(x) for x in inputs(seeded(), *variant.shape)]
        wanted = differentiated if variant.gradient else []
        return {name: step_of(losses[name], tensors, wanted) for name in (OURS, PLAIN)}

    setting = f"{loss} {variant.shape} {variant.name}".strip()
    return Case(setting, set_up, loss=loss, tolerances={OURS: tolerance})


def loss_case(
    rows: int,
    classes: int,
    losses: Mapping[str, Callable | None],
    inputs: Inputs = ONE,
    *,
    bars: Sequence[Bar] = (),
    loss: str = "",
    differentiated: Sequence[int] = (0,),
) -> Case:
    """A training step of each of ``losses`` (those that are there), of the plain one under
    ``torch.compile`` (at :data:`COMPILED_SHAPES`), and of ``F.cross_entropy`` as limit.
    ``differentiated``: the inputs that get a gradient."""

    shape = (rows, classes)

    def set_up():
        generator = seeded()
        tensors = inputs(generator, rows, classes)
        labels = torch.randint(classes, (rows,), generator=generator)
        there = {name: function for name, function in losses.items() if function is not None}
        device = tensors[0].device
        if PLAIN in there and (shape in COMPILED_SHAPES or device.type == "cuda"):
            there[COMPILED] = compiled(there[PLAIN])
        providers = {name: step_of(function, tensors, differentiated) for name, function in there.items()}
        limit = step_of(lambda y, *_: F.cross_entropy(y, labels), tensors, [0])
        if device.type != "cpu":
            providers[COPY] = copy_of_as_much(tensors, differentiated)
        return providers | {LIMIT: Provider(limit.step, None)}

    return Case(
        f"{loss} {shape}".strip(),
        set_up,
        bars,
        quick=rows * classes < 1 << 18,
        small=shape in SMALL,
        loss=loss,
        sizes={"B": rows, "C": classes},
    )


def copy_of_as_much(tensors: Sequence[torch.Tensor], differentiated: Sequence[int]) -> Provider:
    """A copy that moves as many bytes as a loss must: it reads each matrix once, and writes a gradient for
    each that is differentiated."""
    moved = [x for x in tensors if x.is_floating_point()] + [tensors[k] for k in differentiated]
    source = tensors[0].new_zeros(sum(x.numel() for x in moved) // 2)
    copy = torch.empty_like(source)
    return Provider(lambda: copy.copy_(source), None)


def footprint(
    losses: Losses, inputs: Inputs = ONE, *, loss: str = "", differentiated: Sequence[int] = (0,)
) -> Footprint:
    """A loss at :data:`LARGE`."""
    rows, classes = LARGE
    case = loss_case(rows, classes, losses(classes), inputs, loss=loss, differentiated=differentiated)
    return Footprint(case, 4 * rows * classes * len(differentiated))


def step_of(function: Callable, tensors: Sequence[torch.Tensor], differentiated: Iterable[int]) -> Provider:
    """Forward and, unless nothing is ``differentiated``, backward of a loss, the first output if there
    are several."""
    inputs = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in tensors
    ]
    leaves = [inputs[k].requires_grad_() for k in differentiated]

    def forward():
        return function(*inputs)

    def step():
        for leaf in leaves:
            leaf.grad = None
        outputs = forward()
        if leaves:
            scalar = outputs[0] if isinstance(outputs, tuple) else outputs
            scalar.backward()
        return outputs

    def result():
        outputs = step()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*(torch.as_tensor(x).detach().clone() for x in outputs), *(x.grad.clone() for x in leaves)]

    return Provider(step, result, forward)
