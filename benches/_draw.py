"""The pictures of docs/images, from the kept results."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benches._case import COMPILED, LIMIT, OURS, PLAIN, TLLIB
from benches._pages import machine
from benches._report import digits

IMAGES = pathlib.Path(__file__).parent.parent / "docs/images"
OVERVIEW, GROWTH = "bench.png", "bench_growth.png"

#: Marker and colour of each provider; all others are packages, and share one.
STYLE = {
    OURS: ("o", "#d62728"),
    PLAIN: ("s", "#1f4e79"),
    TLLIB: ("D", "#6a3d9a"),
    COMPILED: ("^", "#33a02c"),
    LIMIT: ("|", "#222222"),
}
PACKAGE = ("o", "#f0a030")
#: In curves, where each has a name, the second package of a panel looks different.
SECOND = ("v", "#8c6d31")
NAMES = {OURS: "tllib_rs", PLAIN: "plain PyTorch", COMPILED: "torch.compile", TLLIB: "tllib", LIMIT: "limit"}

#: The rows of the overview: method, loss, label, and the settings of the two panels.
SMALL, LARGE = "(32, 31)", "(256, 1000)"
ROWS = [
    ("pseudo_label", "", "pseudo label", SMALL, LARGE),
    ("uda", "", "UDA", SMALL, LARGE),
    ("pi_model", "", "Pi model, L2", SMALL, LARGE),
    ("self_ensemble", "", "class balance", SMALL, LARGE),
    ("dst", "", "worst case (DST)", SMALL, LARGE),
    ("reid_loss", "soft cross entropy", "soft cross entropy", SMALL, LARGE),
    ("reid_loss", "label smooth", "label smooth", SMALL, LARGE),
    ("mcc", "", "MCC", SMALL, LARGE),
    ("cc_loss", "", "CC loss", SMALL, LARGE),
    ("reid_loss", "soft triplet", "soft triplet", "(64, 2048)", "(1024, 256)"),
    ("reid_loss", "triplet", "triplet", "(64, 2048)", "(1024, 256)"),
    ("self_tuning", "", "Self-Tuning", "C = 10", "C = 200"),
    ("flexmatch", "", "FlexMatch", "N = 50,000", "N = 1,281,167"),
    ("mean_teacher", "", "teacher (EMA)", "MobileNet v2", "ResNet-50"),
]
#: The losses in the panel of row losses.
SWEEPS = [row[:3] for row in ROWS[:7]]


def draw(runs: Mapping[str, Any], folder: pathlib.Path = IMAGES) -> list[pathlib.Path]:
    """Draw both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / OVERVIEW, folder / GROWTH]
    for path, picture in zip(paths, (_overview, _growth), strict=True):
        figure = picture(runs)
        # Without matplotlib's version, which would change the file with every other one.
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)
    return paths


def _case(runs: Mapping[str, Any], stem: str, setting: str) -> Mapping[str, Any] | None:
    cases = runs[stem]["cases"] if stem in runs else []
    return next((case for case in cases if case["setting"] == setting), None)


def _style(provider: str) -> tuple[str, str]:
    return STYLE.get(provider, PACKAGE)


# -------------------------------------------------------------------------------------------- overview


def _overview(runs: Mapping[str, Any]) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(12, 6.4), sharex=True, layout="constrained")
    for panel, column, title in zip(panels, (3, 4), ("small", "large"), strict=True):
        for height, row in enumerate(reversed(ROWS)):
            setting = row[column]
            case = _case(runs, row[0], f"{row[1]} {setting}".strip())
            label = f"{row[2]}\n{setting}" if column == 3 else setting
            panel.text(-0.02, height, label, transform=panel.get_yaxis_transform(), **_LABEL)
            if case:
                _dots(panel, height, case)
        panel.set(xscale="log", ylim=(-0.7, len(ROWS) - 0.3), yticks=[], title=title)
        panel.axvline(1, color=STYLE[OURS][1], linewidth=1.5, zorder=0)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_xlabel("time relative to tllib_rs (right of 1: slower than it)")
    shown = {name for run in runs.values() for case in run["cases"] for name in case["providers"]}
    figure.legend(handles=_legend(panels[0], shown), loc="outside lower center", ncols=7, frameon=False)
    _title(figure, runs, "How long others take for the same step")
    return figure


_LABEL = {"ha": "right", "va": "center", "fontsize": 8, "linespacing": 0.95}


def _dots(panel: Axes, height: int, case: Mapping[str, Any]) -> None:
    ratios = case["ratios"]
    panel.plot([min(1, *ratios.values()), max(1, *ratios.values())], [height] * 2, color="#ccc", zorder=0)
    for name, ratio in ratios.items():
        marker, colour = _style(name)
        size = {"|": 13}.get(marker, 6)
        panel.plot(ratio, height, marker, color=colour, markersize=size, markeredgewidth=2 if size > 9 else 0)
    panel.plot(1, height, STYLE[OURS][0], color=STYLE[OURS][1], markersize=6)
    if PLAIN in ratios:
        text = f"{digits(ratios[PLAIN])}x"
        where = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        panel.annotate(text, (ratios[PLAIN], height), color=STYLE[PLAIN][1], **where)


def _legend(panel: Axes, shown: Iterable[str]) -> Sequence[Any]:
    entries = [(NAMES[name], *style) for name, style in STYLE.items() if name in shown]
    entries.insert(-1, ("other packages, other formulas", *PACKAGE))
    return [
        panel.plot([], [], marker, color=colour, markeredgewidth=2 if marker == "|" else 0, label=name)[0]
        for name, marker, colour in entries
    ]


def _title(figure: plt.Figure, runs: Mapping[str, Any], title: str) -> None:
    newest = max(runs.values(), key=lambda run: run["date"])
    figure.suptitle(f"{title}\n", fontweight="bold")
    figure.text(0.5, 0.945, machine(newest), ha="center", fontsize=8, color="#555")


# ---------------------------------------------------------------------------------------------- growth


def _growth(runs: Mapping[str, Any]) -> plt.Figure:
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    _curves(panels[0, 0], runs, "flexmatch", "", "N", "FlexMatch: number of samples N")
    _curves(panels[0, 1], runs, "mcc", "", "BC", "MCC: number of logits B·C")
    _sweeps(panels[1, 0], runs)
    _curves(panels[1, 1], runs, "reid_loss", "soft triplet", "N", "soft triplet: rows N")
    _title(figure, runs, "How the time of a step grows")
    return figure


def _curves(panel: Axes, runs: Mapping[str, Any], stem: str, loss: str, symbols: str, title: str) -> None:
    """The time of each provider."""
    cases = _sorted(runs, stem, loss, symbols)
    names = list(dict.fromkeys(name for _, case in cases for name in case["providers"]))
    packages = [name for name in names if name not in STYLE]
    for name in names:
        points = [(x, case["providers"][name]["p50"]) for x, case in cases if name in case["providers"]]
        marker, colour = SECOND if name in packages[1:] else _style(name)
        line = "--" if name == LIMIT else "-"
        shown = NAMES.get(name, name)
        panel.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=shown)
    panel.set(xscale="log", yscale="log", xlabel=title, ylabel="seconds a step")
    _finish(panel)


def _sweeps(panel: Axes, runs: Mapping[str, Any]) -> None:
    """The row losses in multiples of their limit."""
    for stem, loss, label in SWEEPS:
        points = [(x, 1 / case["ratios"][LIMIT]) for x, case in _sorted(runs, stem, loss, "BC")]
        if points:
            panel.plot(*zip(*points, strict=True), "-o", markersize=4, label=label)
    panel.axhline(1, linestyle="--", color=STYLE[LIMIT][1], label="limit: F.cross_entropy")
    panel.set(xscale="log", ylim=(0, None), xlabel="row losses: number of logits B·C", ylabel="time / limit")
    _finish(panel)


def _sorted(
    runs: Mapping[str, Any], stem: str, loss: str, symbols: str
) -> list[tuple[int, Mapping[str, Any]]]:
    cases: Iterable[Mapping[str, Any]] = runs[stem]["cases"] if stem in runs else []
    found = []
    for case in cases:
        if case["loss"] == loss and case["sizes"]:
            x = 1
            for symbol in symbols:
                x *= case["sizes"][symbol]
            found.append((x, case))
    return sorted(found, key=lambda point: point[0])


def _finish(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)
