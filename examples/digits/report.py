"""The table, the losses and the picture."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tabulate import tabulate

from digits.config import Config

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend has to be chosen first

METHODS = ("supervised only", "FlexMatch")
COLOURS = {"supervised only": "#D55E00", "FlexMatch": "#0072B2"}  # Okabe and Ito: safe for colour-blind eyes
EXTREMES = {"highest": "#009E73", "lowest": "#CC79A7"}


@dataclass
class History:
    """What a run leaves: the loss of every iteration, and what the picture shows, one entry an evaluation."""

    losses: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the EMA teacher on the test images, in %
    status: list[torch.Tensor] = field(default_factory=list)  # (NUM_CLASSES,), FlexMatch's beta
    thresholds: list[torch.Tensor] = field(default_factory=list)  # (NUM_CLASSES,)


def final_accuracies(histories: list[History]) -> np.ndarray:
    """(seeds,), in %."""
    return np.array([history.accuracies[-1] for history in histories])


def table(runs: dict[str, list[History]], seeds: list[int]) -> str:
    """Test accuracies: a row a method."""
    rows = []
    for method, histories in runs.items():
        finals = final_accuracies(histories)
        rows.append([method, *finals, f"{finals.mean():.2f} ± {finals.std():.2f}", 100 - finals.mean()])
    headers = ["test accuracy, %", *(f"seed {seed}" for seed in seeds), "mean ± std", "mean error, %"]
    return tabulate(rows, headers, floatfmt=".2f", numalign="right")


def error_ratio(runs: dict[str, list[History]]) -> float:
    """Mean error of FlexMatch over that of supervised-only training."""
    supervised, flexmatch = (100 - final_accuracies(runs[method]).mean() for method in METHODS)
    return flexmatch / supervised if supervised else math.inf


def draw_accuracy(axes: plt.Axes, runs: dict[str, list[History]]) -> None:
    """Learning curves: the mean over the seeds, and a band from the worst to the best."""
    for method, histories in runs.items():
        curves = np.array([history.accuracies for history in histories])
        iterations, mean, colour = histories[0].iterations, curves.mean(0), COLOURS[method]
        axes.plot(iterations, mean, color=colour, linewidth=3, label=f"{method}, {mean[-1]:.1f} %")
        axes.fill_between(iterations, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
    # The first iterations lie far below; where the methods differ is what matters.
    finals = np.concatenate([final_accuracies(histories) for histories in runs.values()])
    bottom = max(5 * math.floor(finals.min() / 5) - 15, 0)
    axes.set(title="Test accuracy, %", ylim=(bottom, 100))
    axes.legend(loc="lower right", handlelength=1.2)


def draw_classes(axes: plt.Axes, iterations: list[int], values: np.ndarray, order: np.ndarray) -> None:
    """One line a class: grey, but for the first and the last in `order`, which goes by status."""
    for digit in order[1:-1]:
        axes.plot(iterations, values[:, digit], color="0.72", linewidth=1.3)
    for extreme, digit in (("highest", order[-1]), ("lowest", order[0])):
        label = f"digit {digit}, {extreme} status"
        axes.plot(iterations, values[:, digit], color=EXTREMES[extreme], linewidth=3, label=label)
    axes.plot([], [], color="0.72", linewidth=1.3, label="the other digits")


def draw(runs: dict[str, list[History]], config: Config, seeds: list[int], path: Path) -> None:
    """The picture: learning curves, then status and thresholds of the classes in the first seed's run."""
    history = runs["FlexMatch"][0]
    status, thresholds = torch.stack(history.status).numpy(), torch.stack(history.thresholds).numpy()
    order = status.mean(0).argsort()
    style = {"font.size": 15, "axes.titlesize": 17, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlepad": 12}
    style |= {"axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.92", "legend.frameon": False}
    with plt.rc_context(style | {"axes.axisbelow": True}):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.6), layout="constrained")
        draw_accuracy(left, runs)
        draw_classes(middle, history.iterations, status, order)
        middle.set(title="Learning status β of each class", ylim=(0, 1.04))
        middle.legend(loc="lower right", handlelength=1.2)
        draw_classes(right, history.iterations, thresholds, order)
        right.axhline(config.threshold, color="0.25", linestyle=":", linewidth=2)
        right.set(title="Confidence threshold of each class", ylim=(0, 1.04))
        right.annotate(
            f"fixed threshold {config.threshold}",
            (config.iterations, config.threshold),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color="0.25",
        )
        for axes in (left, middle, right):
            axes.set(xlabel="iteration", xlim=(0, config.iterations))
        figure.suptitle(
            f"Digits with {config.labels_per_class} labels a class.  Left: mean and range of "
            f"{len(seeds)} seeds.  Middle and right: FlexMatch, seed {seeds[0]}.",
            x=0.01,
            ha="left",
        )
        figure.get_layout_engine().set(wspace=0.06, h_pad=0.1)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def losses(runs: dict[str, list[History]], seeds: list[int]) -> str:
    """The loss of every iteration as CSV, with all its digits."""
    lines = ["method,seed,iteration,loss"]
    for method, histories in runs.items():
        for seed, history in zip(seeds, histories, strict=True):
            lines += [f"{method},{seed},{k},{loss!r}" for k, loss in enumerate(history.losses, start=1)]
    return "\n".join(lines) + "\n"
