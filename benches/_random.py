"""Settings that nobody chose: random shapes, dtypes and layouts, against the plain formulation.

The listed cases are what the kernels were made for. This looks for settings in which they are slow.
"""

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence

from tabulate import tabulate

from benches import _report
from benches._case import OURS, PLAIN, Case, Disagreement, Method, Provider, Verdict, check
from benches._families import Drawn, Family
from benches._measure import FULL, QUICK, Result, measure

#: Those below are measured again, for long.
CLOSE = 1.15
#: The slowest are printed.
SHOWN = 15


def run(methods: Sequence[Method], seconds: float, seed: int) -> list[Verdict]:
    """Time what is drawn from ``seed`` for so many seconds; print the settings where ours gains least."""
    families = [(method.stem, family) for method in methods for family in method.families]
    end, ratios, wrong = time.monotonic() + seconds, [], []
    for stem, drawn in _drawn(families, seed):
        if time.monotonic() >= end:
            break
        case = drawn.case
        try:
            providers = _agreeing(drawn)
        except Disagreement as error:
            wrong.append(Verdict(f"{stem}: {error}", met=False))
            continue
        result = _timed(stem, case, providers)
        ratios.append((result.ratio(PLAIN), f"{stem}: {case.setting}", result.median(OURS)))
    verdicts = [*_reported(sorted(ratios)), *wrong]
    _report.print_verdicts(verdicts)
    return verdicts


def _drawn(families: Sequence[tuple[str, Family]], seed: int) -> Iterator[tuple[str, Drawn]]:
    """Settings without end."""
    for count in itertools.count():
        # By its number, so that a setting does not depend on those before it.
        generator = random.Random(f"{seed} {count}")
        stem, family = generator.choice(families)
        yield stem, family(generator)


def _agreeing(drawn: Drawn) -> Mapping[str, Provider]:
    """Ours and plain, of which ours has been compared."""
    there = drawn.case.set_up()
    providers = {name: there[name] for name in (OURS, PLAIN)}
    if drawn.exact is not None:
        check(drawn.case, {OURS: providers[OURS], PLAIN: drawn.exact.set_up()[PLAIN]})
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
