"""What is printed."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from benches._case import OURS, Verdict
from benches._measure import Result
from benches._results import environment

_UNITS = [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)]
_SIZES = [("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)]


def seconds(value: float, *, spread: tuple[float, float] | None = None) -> str:
    """A duration, and in parentheses two others in the same unit."""
    unit, size = next((u for u in _UNITS if value >= u[1]), _UNITS[-1])
    between = f" ({digits(spread[0] / size)}-{digits(spread[1] / size)})" if spread else ""
    return f"{digits(value / size)}{between} {unit}"


def size(value: float) -> str:
    """A number of bytes."""
    unit, one = next((u for u in _SIZES if value >= u[1]), _SIZES[-1])
    return f"{digits(value / one)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, more only before the decimal point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def print_environment() -> None:
    """Print :func:`benches._results.environment`."""
    print(tabulate(environment().items(), tablefmt="plain"))


def print_method(stem: str, results: Sequence[Result], verdicts: Iterable[Verdict]) -> None:
    """A table with a line for each provider, and the verdicts."""
    rows = [row for result in results for row in _rows(result)]
    print(f"\n{stem}")
    print(tabulate(rows, ["", "", "median (p20-p80)", f"/{OURS}", "memory"], disable_numparse=True))
    print_verdicts(verdicts)


def print_verdicts(verdicts: Iterable[Verdict]) -> None:
    """One line each."""
    for verdict in verdicts:
        print(f"  {'met   ' if verdict.met else 'MISSED'}  {verdict.text}")


def _rows(result: Result) -> Iterable[list[str]]:
    setting = result.case.setting
    for name in result.measurements:
        p20, p50, p80 = result.percentiles(name)
        ratio = "" if name == OURS else digits(result.ratio(name))
        memory = size(result.memory[name]) if name in result.memory else ""
        yield [setting, name, seconds(p50, spread=(p20, p80)), ratio, memory]
        setting = ""
    for name, reason in result.left_out.items():
        yield ["", name, f"left out: {reason[:60]}", "", ""]
