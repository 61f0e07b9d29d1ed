"""Settings that are drawn at random: what ``families`` of a method's file are made of."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benches._case import Case
from benches._losses import CONTIGUOUS, LAYOUTS, ONE, Inputs, Losses, Variant, variant_case

#: Drawn as often as they stand here.
DTYPES = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]
ARRANGED = [CONTIGUOUS] * 4 + LAYOUTS
GRADIENT = [True, True, True, False]
#: What is accepted of ours, as :data:`benches._case.TOLERANCE`, against plain in float64: in float32 it loses
#: digits of small differences (``1 - p``, distances), and with them the hardest example. Half types are timed
#: and not compared: what they round may be on the other side of a threshold.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Drawn:
    """One setting."""

    case: Case
    #: Whose plain formulation ours is compared with: the same in float64. ``None``: not compared.
    exact: Case | None


#: Draws a setting.
Family = Callable[[random.Random], Drawn]


def log_uniform(generator: random.Random, least: int, most: int) -> int:
    """A number between these, as likely to be small as large."""
    return round(math.exp(generator.uniform(math.log(least), math.log(most))))


def in_some_dtype(case: Callable[[torch.dtype, float], Case], dtype: torch.dtype) -> Drawn:
    """``case`` of a dtype and what is accepted of ours."""
    tolerance = TOLERANCES.get(dtype, math.inf)
    exact = case(torch.float64, tolerance) if tolerance < math.inf else None
    return Drawn(case(dtype, tolerance), exact)


def family(
    losses: Losses,
    inputs: Inputs = ONE,
    *,
    loss: str = "",
    differentiated: Sequence[int] = (0,),
    largest: tuple[int, int] = (16_384, 8192),
    elements: int = 1 << 22,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Family:
    """A loss over matrices of at most the ``largest`` rows and columns, and so many ``elements``."""

    def draw(generator):
        drawn = generator.choice([dtype for dtype in DTYPES if dtype in dtypes])
        layout, gradient = generator.choice(ARRANGED), generator.choice(GRADIENT)
        shape = _shape(generator, largest, elements)
        named = [str(drawn).removeprefix("torch."), layout, *([] if gradient else ["no gradient"])]

        def case(dtype, tolerance):
            variant = Variant(", ".join(named), shape, dtype, layout, gradient, tolerance)
            return variant_case(variant, losses(shape[1]), inputs, tolerance, loss, differentiated)

        return in_some_dtype(case, drawn)

    return draw


def _shape(generator: random.Random, largest: tuple[int, int], elements: int) -> tuple[int, int]:
    while True:
        # Of one row, some gradients are rounding noise alone, which cannot be compared.
        rows, columns = (log_uniform(generator, 2, most) for most in largest)
        if rows * columns <= elements:
            return rows, columns
