"""FlexMatch against supervised-only training on scikit-learn's digits, with a handful of labels a class.

    python examples/digits_flexmatch.py            # three seeds, both methods, a table and a picture
    python examples/digits_flexmatch.py --quick    # seconds: does everything run?

Supervised-only training is FlexMatch without its unlabelled term, and nothing else differs: the network and
its initial weights, the labelled images, their augmentation (weak views only, as in the paper), the
optimizer, the number of iterations and the EMA teacher that is evaluated. FlexMatch's term trains the
prediction for a strongly augmented view of an unlabelled image towards the pseudo label of a weakly augmented
one, wherever the confidence in that label reaches the threshold of its class.

The test images are the same for every seed and serve for nothing but the reported accuracies: the last
iteration counts, not the best one. The settings were chosen on other images, held out of the rest.
"""

import argparse
import math
import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mean_teacher import EMATeacher, update_bn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend has to be chosen first

NUM_CLASSES = 10
METHODS = ("supervised only", "FlexMatch")
COLOURS = {"supervised only": "#D55E00", "FlexMatch": "#0072B2"}  # Okabe and Ito: safe for colour-blind eyes
EXTREMES = {"highest": "#009E73", "lowest": "#CC79A7"}
MAX_ERROR_RATIO = 0.6
CAPTION = """\
Test accuracy of the EMA teacher, last iteration. "supervised only" is FlexMatch without its unlabelled term:
same network, initial weights, labelled images, weak augmentation, optimizer and iterations."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its seed and its method."""

    iterations: int = 1000
    labels_per_class: int = 4
    unlabelled_batch: int = 128
    width: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    ema_alpha: float = 0.99
    threshold: float = 0.95
    evaluations: int = 40


@dataclass(frozen=True)
class Split:
    """Images are (n, 1, 8, 8) in [0, 1]."""

    images: torch.Tensor
    labels: torch.Tensor
    unlabelled: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass
class History:
    """What the picture shows: one entry an evaluation."""

    iterations: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the EMA teacher on the test images, in %
    status: list[torch.Tensor] = field(default_factory=list)  # (NUM_CLASSES,), FlexMatch's beta
    thresholds: list[torch.Tensor] = field(default_factory=list)  # (NUM_CLASSES,)


# Data ---------------------------------------------------------------------------------------------------


def split_digits(seed: int, labels_per_class: int) -> Split:
    """Hold out a third for testing, whatever the seed; the seed draws which of the rest are labelled."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    labelled, unlabelled = train_test_split(
        train, train_size=NUM_CLASSES * labels_per_class, stratify=labels[train], random_state=seed
    )
    return Split(images[labelled], labels[labelled], images[unlabelled], images[test], labels[test])


def batches(n: int, batch_size: int):
    """Indices in random order, for ever; each epoch drops its incomplete batch."""
    while True:
        yield from torch.randperm(n).split(batch_size)[: n // batch_size]


# Augmentation: one call for a whole batch ------------------------------------------------------------------


def uniform(radius: float, *shape: int) -> torch.Tensor:
    """Uniform in [-radius, radius]."""
    return (2 * torch.rand(shape) - 1) * radius


def affine(
    images: torch.Tensor, shift: float, degrees: float = 0, scale: float = 0, shear: float = 0
) -> torch.Tensor:
    """Each image under its own random affine map; the shift is in pixels."""
    n = len(images)
    angle, skew, pixel = uniform(math.radians(degrees), n), uniform(shear, n), 2 / images.shape[-1]
    scale_x, scale_y = 1 + uniform(scale, n), 1 + uniform(scale, n)
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale_x, skew - angle.sin() * scale_y, uniform(shift * pixel, n)], 1),
            torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, uniform(shift * pixel, n)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cutout(images: torch.Tensor, size: int) -> torch.Tensor:
    """Black out a square of each image, at a random place that may reach over the border."""
    n, _, height, width = images.shape
    rows = torch.arange(height) - torch.randint(1 - size, height, (n, 1))
    columns = torch.arange(width) - torch.randint(1 - size, width, (n, 1))
    inside_rows, inside_columns = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
    return images.masked_fill((inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1), 0)


def weak(images: torch.Tensor) -> torch.Tensor:
    """Shifts of up to a pixel and small rotations."""
    return affine(images, shift=1, degrees=10)


def strong(images: torch.Tensor) -> torch.Tensor:
    """Shift, rotation, scale and shear, then contrast, noise and cutout."""
    images = affine(images, shift=1.5, degrees=25, scale=0.2, shear=0.2)
    images = images * (1 + uniform(0.4, len(images), 1, 1, 1)) + 0.1 * torch.randn_like(images)
    return cutout(images, size=3)


# Network and training ---------------------------------------------------------------------------------------


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU. `update_bn` finds batch norms by the "bn" in their names."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels_out), relu=nn.ReLU(inplace=True)))


def network(width: int) -> nn.Module:
    """A small convolutional network for 8 x 8 images."""
    net = nn.Sequential(
        block(1, width),
        block(width, 2 * width, stride=2),
        block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, NUM_CLASSES),
    )
    return net.to(memory_format=torch.channels_last)  # on CPUs a third faster at this size


def self_training_loss(logits: torch.Tensor, pseudo_labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the strong views with the pseudo labels that were selected, over the whole batch."""
    return (F.cross_entropy(logits, pseudo_labels, reduction="none") * mask).mean()


def train(method: str, seed: int, config: Config, progress: tqdm) -> History:
    """One run; it depends on its arguments only."""
    torch.manual_seed(seed)
    data = split_digits(seed, config.labels_per_class)
    student = network(config.width)
    teacher = EMATeacher(student, config.ema_alpha)
    teacher.eval()
    thresholding = DynamicThresholdingModule(
        config.threshold, True, lambda x: x / (2 - x), NUM_CLASSES, len(data.unlabelled), "cpu"
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    unlabelled_batches = batches(len(data.unlabelled), min(config.unlabelled_batch, len(data.unlabelled)))
    history = History()

    for iteration in range(1, config.iterations + 1):
        labelled = weak(data.images)
        if method == "FlexMatch":
            indices = next(unlabelled_batches)
            unlabelled = data.unlabelled[indices]
            # One pass, so that batch norm sees all three kinds of images together.
            logits = student(torch.cat([labelled, weak(unlabelled), strong(unlabelled)]))
            sizes = [len(labelled), len(unlabelled), len(unlabelled)]
            labelled_logits, weak_logits, strong_logits = logits.split(sizes)
            confidence, pseudo_labels = weak_logits.detach().softmax(1).max(1)
            mask = (confidence >= thresholding.get_threshold(pseudo_labels)).float()
            # The status counts what passes the fixed threshold, not that of the class.
            thresholding.update(indices, (confidence >= config.threshold).float(), pseudo_labels)
            loss = F.cross_entropy(labelled_logits, data.labels)
            loss = loss + self_training_loss(strong_logits, pseudo_labels, mask)
        else:
            loss = F.cross_entropy(student(labelled), data.labels)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        teacher.update()
        update_bn(student, teacher.teacher)

        progress.update()
        if is_evaluated(iteration, config):
            history.iterations.append(iteration)
            history.accuracies.append(accuracy(teacher, data))
            history.status.append(class_status(thresholding))
            history.thresholds.append(thresholding.get_threshold(torch.arange(NUM_CLASSES)))
    return history


def is_evaluated(iteration: int, config: Config) -> bool:
    """Evenly spaced, the last iteration among them."""
    every = max(config.iterations // config.evaluations, 1)
    return iteration % every == 0 or iteration == config.iterations


@torch.no_grad()
def accuracy(teacher: EMATeacher, data: Split) -> float:
    """Accuracy on the test images, in %."""
    return 100 * (teacher(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def class_status(thresholding: DynamicThresholdingModule) -> torch.Tensor:
    """How well each class is learned, from 0 to 1; the samples without a label are counted first."""
    counts = thresholding.class_counts()
    return counts[1:] / counts.max()


# Report -----------------------------------------------------------------------------------------------------


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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=Config.iterations)
    parser.add_argument("--labels-per-class", type=int, default=Config.labels_per_class)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for table and picture")
    parser.add_argument("--readme", action="store_true", help="also write docs/images/demo.png")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 iterations, no verdict")
    return parser.parse_args()


def main() -> int:
    """Train, report; 1 where FlexMatch does not keep its promise."""
    arguments = parse_arguments()
    config = Config(iterations=arguments.iterations, labels_per_class=arguments.labels_per_class)
    seeds = arguments.seeds
    if arguments.quick:
        config, seeds = replace(config, iterations=100, evaluations=10), seeds[:1]
    torch.set_num_threads(1)  # the tensors are small: more threads would mostly wait for each other

    total = len(METHODS) * len(seeds) * config.iterations
    runs = {method: [] for method in METHODS}
    with tqdm(total=total, unit=" iterations", disable=None) as progress:
        for seed in seeds:
            for method in METHODS:
                progress.set_description(f"seed {seed}, {method}")
                runs[method].append(train(method, seed, config, progress))

    arguments.out.mkdir(parents=True, exist_ok=True)
    verdict = f"error of FlexMatch / error of supervised only: {error_ratio(runs):.2f}"
    report = f"{table(runs, seeds)}\n\n{CAPTION}\n\n{verdict}\n"
    (arguments.out / "digits_flexmatch.txt").write_text(report, encoding="utf-8")
    draw(runs, config, seeds, arguments.out / "digits_flexmatch.png")
    print(report)
    print(f"written to {arguments.out}: digits_flexmatch.txt, digits_flexmatch.png")
    if arguments.readme:
        image = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, config, seeds, image)
    if not arguments.quick and error_ratio(runs) > MAX_ERROR_RATIO:
        print(f"FAILED: the ratio of the errors should be at most {MAX_ERROR_RATIO}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
