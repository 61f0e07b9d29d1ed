"""Settings that nobody chose: losses at random shapes, dtypes and layouts, against the plain formulation.

The listed cases are what the kernels were made for. This looks for settings in which they are slow.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from tabulate import tabulate

from benches import _report
from benches._case import OURS, PLAIN, Case, Disagreement, Method, Provider, Verdict, check
from benches._losses import CONTIGUOUS, LAYOUTS, Family, Variant
from benches._measure import FULL, QUICK, Result, measure

#: Drawn as often as they stand here.
DTYPES = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]
ARRANGED = [CONTIGUOUS] * 4 + LAYOUTS
GRADIENT = [True, True, True, False]
#: What is accepted of ours, as :data:`benches._case.TOLERANCE`, against plain in float64: in float32 it loses
#: digits of small differences (``1 - p``, distances), and with them the hardest example. Half types are timed
#: and not compared: what they round may be on the other side of a threshold.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
#: Those below are measured again, for long.
CLOSE = 1.15
#: The slowest are printed.
SHOWN = 15


def run(methods: Sequence[Method], seconds: float, seed: int) -> list[Verdict]:
    """Time what is drawn from ``seed`` for so many seconds; print the settings where ours gains least."""
    families = [(method.stem, family) for method in methods for family in method.families]
    end, ratios, wrong = time.monotonic() + seconds, [], []
    for stem, family, variant in _drawn(families, seed):
        if time.monotonic() >= end:
            break
        case = family.case(variant)
        try:
            providers = _agreeing(family, variant, case)
        except Disagreement as error:
            wrong.append(Verdict(f"{stem}: {error}", met=False))
            continue
        result = _timed(stem, case, providers)
        ratios.append((result.ratio(PLAIN), f"{stem}: {case.setting}", result.median(OURS)))
    verdicts = [*_reported(sorted(ratios)), *wrong]
    _report.print_verdicts(verdicts)
    return verdicts


def _drawn(families: Sequence[tuple[str, Family]], seed: int) -> Iterator[tuple[str, Family, Variant]]:
    """Settings without end."""
    for count in itertools.count():
        # By its number, so that a setting does not depend on those before it.
        generator = random.Random(f"{seed} {count}")
        stem, family = generator.choice(families)
        dtype = generator.choice([dtype for dtype in DTYPES if dtype in family.dtypes])
        layout, gradient = generator.choice(ARRANGED), generator.choice(GRADIENT)
        name = ", ".join([str(dtype).removeprefix("torch."), layout, *([] if gradient else ["no gradient"])])
        tolerance = TOLERANCES.get(dtype, math.inf)
        yield stem, family, Variant(name, _shape(generator, family), dtype, layout, gradient, tolerance)


def _shape(generator: random.Random, family: Family) -> tuple[int, int]:
    """Rows and columns, each as likely to be small as large, of no more elements than the family's."""
    # Of one row, some gradients are rounding noise alone, which cannot be compared.
    logarithms = [(math.log(2), math.log(most)) for most in family.largest]
    while True:
        rows, columns = (round(math.exp(generator.uniform(*limits))) for limits in logarithms)
        if rows * columns <= family.elements:
            return rows, columns


def _agreeing(family: Family, variant: Variant, case: Case) -> Mapping[str, Provider]:
    """Ours and plain, of which ours has been compared."""
    providers = case.set_up()
    if variant.tolerance < math.inf:
        exact = family.case(dataclasses.replace(variant, dtype=torch.float64)).set_up()
        check(case, {OURS: providers[OURS], PLAIN: exact[PLAIN]})
    return providers


def _timed(stem: str, case: Case, providers: Mapping[str, Provider]) -> Result:
    labels = {"label": stem, "sub_label": case.setting}
    result = Result(case, measure(providers, QUICK, **labels))
    if result.ratio(PLAIN) >= CLOSE:
        return result
    return dataclasses.replace(result, measurements=measure(providers, FULL, **labels))


def _reported(ratios: Sequence[tuple[float, str, float]]) -> list[Verdict]:
    """The verdicts, after a table."""
    rows = [[text, _report.seconds(own), _report.digits(ratio)] for ratio, text, own in ratios[:SHOWN]]
    print(f"\n{len(ratios)} settings, of which these gain least")
    print(tabulate(rows, ["", OURS, f"{PLAIN}/{OURS}"], disable_numparse=True))
    if not ratios:
        return [Verdict("no setting was measured", met=False)]
    slower = sum(ratio < 1 for ratio, *_ in ratios)
    middle = ratios[len(ratios) // 2][0]
    text = (
        f"slower than {PLAIN} in {slower} of {len(ratios)} settings (at most 0); "
        f"in half of them at least {middle:.3g} times as fast"
    )
    return [Verdict(text, slower == 0)]
