"""FlexMatch against supervised-only training on scikit-learn's digits, with a handful of labels a class.

    python examples/digits_flexmatch.py            # three seeds, both methods, a table and a picture
    python examples/digits_flexmatch.py --quick    # seconds: does everything run?
    python examples/digits_flexmatch.py --resume   # go on where the last one was stopped

Supervised-only training is FlexMatch without its unlabelled term, and nothing else differs: the network and
its initial weights, the labelled images, their augmentation (weak views only, as in the paper), the
optimizer, the number of iterations and the EMA teacher that is evaluated. FlexMatch's term trains the
prediction for a strongly augmented view of an unlabelled image towards the pseudo label of a weakly augmented
one, wherever the confidence in that label reaches the threshold of its class.

The test images are the same for every seed and serve for nothing but the reported accuracies: the last
iteration counts, not the best one. The settings were chosen on other images, held out of the rest.

Everything that the next iteration depends on is saved now and then, so that a run that is stopped, in
whatever way, and continued by ``--resume`` has the losses of one that never stopped, to the last bit.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import report
from digits.config import Config
from digits.data import NUM_CLASSES, Batches, split_digits, strong, weak
from digits.network import network
from digits.report import METHODS, History
from tqdm import tqdm

from tllib_rs import checkpoint
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mean_teacher import EMATeacher, update_bn

NAME = "digits_flexmatch"
MAX_ERROR_RATIO = 0.6
CAPTION = """\
Test accuracy of the EMA teacher, last iteration. "supervised only" is FlexMatch without its unlabelled term:
same network, initial weights, labelled images, weak augmentation, optimizer and iterations."""


def self_training_loss(logits: torch.Tensor, pseudo_labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the strong views with the pseudo labels that were selected, over the whole batch."""
    return (F.cross_entropy(logits, pseudo_labels, reduction="none") * mask).mean()


class Run:
    """One training. It depends on its arguments only, and can be stopped after every iteration."""

    def __init__(self, method: str, seed: int, config: Config):
        torch.manual_seed(seed)
        self.method, self.config = method, config
        self.data = split_digits(seed, config.labels_per_class)
        samples = len(self.data.unlabelled)
        self.student = network(config.width)
        self.teacher = EMATeacher(self.student, config.ema_alpha)
        self.teacher.eval()
        self.thresholding = DynamicThresholdingModule(
            config.threshold, True, lambda x: x / (2 - x), NUM_CLASSES, samples, "cpu"
        )
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.iterations)
        self.batches = Batches(samples, min(config.unlabelled_batch, samples))
        self.history = History()

    @property
    def stateful(self) -> dict[str, Any]:
        """All that has a state, but for the random numbers and the history."""
        names = ("student", "teacher", "thresholding", "optimizer", "schedule", "batches")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        states = {name: value.state_dict() for name, value in self.stateful.items()}
        return states | {"history": asdict(self.history), "random": checkpoint.random_states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in self.stateful.items():
            value.load_state_dict(state[name])
        self.history = History(**state["history"])
        checkpoint.set_random_states(state["random"])

    def train(self) -> Iterator[int]:
        """The rest of the iterations; yields the number of each when it is done."""
        for iteration in range(len(self.history.losses) + 1, self.config.iterations + 1):
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.teacher.update()
            update_bn(self.student, self.teacher.teacher)
            self.history.losses.append(loss.item())
            if self.config.is_evaluated(iteration):
                self.evaluate(iteration)
            yield iteration

    def loss(self) -> torch.Tensor:
        """The loss of fresh views of the labelled images and of the next unlabelled ones."""
        labelled = weak(self.data.images)
        if self.method != "FlexMatch":
            return F.cross_entropy(self.student(labelled), self.data.labels)
        indices = next(self.batches)
        unlabelled = self.data.unlabelled[indices]
        # One pass, so that batch norm sees all three kinds of images together.
        logits = self.student(torch.cat([labelled, weak(unlabelled), strong(unlabelled)]))
        sizes = [len(labelled), len(unlabelled), len(unlabelled)]
        labelled_logits, weak_logits, strong_logits = logits.split(sizes)
        confidence, pseudo_labels = weak_logits.detach().softmax(1).max(1)
        mask = (confidence >= self.thresholding.get_threshold(pseudo_labels)).float()
        # The status counts what passes the fixed threshold, not that of the class.
        self.thresholding.update(indices, (confidence >= self.config.threshold).float(), pseudo_labels)
        loss = F.cross_entropy(labelled_logits, self.data.labels)
        return loss + self_training_loss(strong_logits, pseudo_labels, mask)

    @torch.no_grad()
    def evaluate(self, iteration: int) -> None:
        """Note the teacher's accuracy on the test images, and how well each class is learned."""
        correct = (self.teacher(self.data.test_images).argmax(1) == self.data.test_labels).float()
        # From 0 to 1; the samples without a label are counted first.
        counts = self.thresholding.class_counts()
        self.history.iterations.append(iteration)
        self.history.accuracies.append(100 * correct.mean().item())
        self.history.status.append(counts[1:] / counts.max())
        self.history.thresholds.append(self.thresholding.get_threshold(torch.arange(NUM_CLASSES)))


def train_all(
    settings: dict[str, Any], saved: dict[str, Any], path: Path, every: int
) -> dict[str, list[History]]:
    """Every method with every seed; goes on from ``saved`` and saves to ``path``."""
    config, seeds = Config(**settings["config"]), settings["seeds"]
    finished, current = saved["finished"], saved["current"]
    plan = [(method, seed) for seed in seeds for method in METHODS]
    total = len(plan) * config.iterations
    done = len(finished) * config.iterations + (len(current["history"]["losses"]) if current else 0)

    def save(current: dict[str, Any] | None) -> None:
        checkpoint.save({"settings": settings, "finished": finished, "current": current}, path)

    with tqdm(total=total, initial=done, unit=" iterations", disable=None) as progress:
        for method, seed in plan[len(finished) :]:
            progress.set_description(f"seed {seed}, {method}")
            run = Run(method, seed, config)
            if current:
                run.load_state_dict(current)
                current = None
            for iteration in run.train():
                progress.update()
                if iteration % every == 0:
                    save(run.state_dict())
            finished.append(asdict(run.history))
            save(None)

    runs = {method: [] for method in METHODS}
    for (method, _), history in zip(plan, finished, strict=True):
        runs[method].append(History(**history))
    return runs


def saved_state(path: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """What to go on from: the beginning, or what is in the file."""
    if not (resume and path.exists()):
        return {"finished": [], "current": None}
    saved = checkpoint.load(path)
    if saved["settings"] != settings:
        raise SystemExit(f"{path} is of a run with other settings: {saved['settings']}, now {settings}")
    return saved


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=Config.iterations)
    parser.add_argument("--labels-per-class", type=int, default=Config.labels_per_class)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for table, losses and picture")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"default: {NAME}.pt in that folder")
    parser.add_argument("--save-every", type=int, default=100, metavar="N", help="iterations between saves")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--readme", action="store_true", help="also write docs/images/demo.png")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 iterations, no verdict")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, report; 1 where FlexMatch does not keep its promise."""
    options = parse_arguments(arguments)
    config = Config(iterations=options.iterations, labels_per_class=options.labels_per_class)
    seeds = options.seeds
    if options.quick:
        config, seeds = replace(config, iterations=100, evaluations=10), seeds[:1]
    torch.set_num_threads(1)  # the tensors are small: more threads would mostly wait for each other

    settings = {"config": asdict(config), "seeds": seeds}
    path = options.checkpoint or options.out / f"{NAME}.pt"
    runs = train_all(settings, saved_state(path, settings, options.resume), path, options.save_every)

    options.out.mkdir(parents=True, exist_ok=True)
    ratio = report.error_ratio(runs)
    verdict = f"error of FlexMatch / error of supervised only: {ratio:.2f}"
    text = f"{report.table(runs, seeds)}\n\n{CAPTION}\n\n{verdict}\n"
    (options.out / f"{NAME}.txt").write_text(text, encoding="utf-8")
    (options.out / f"{NAME}.csv").write_text(report.losses(runs, seeds), encoding="utf-8")
    report.draw(runs, config, seeds, options.out / f"{NAME}.png")
    print(text)
    print(f"written to {options.out}: {NAME}.txt, {NAME}.csv, {NAME}.png, {path.name}")
    if options.readme:
        image = Path(__file__).parents[1] / "docs" / "images" / "demo.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        report.draw(runs, config, seeds, image)
    if not options.quick and ratio > MAX_ERROR_RATIO:
        print(f"FAILED: the ratio of the errors should be at most {MAX_ERROR_RATIO}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
