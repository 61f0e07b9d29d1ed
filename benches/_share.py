"""``python -m benches --share [--device cuda]``: the share that self-training takes of a whole training step
of a small network, for each method, plain against ours.

The network is a small convolutional one on a batch of 64 images of CIFAR's size, with its backward pass and
an optimizer's step; the method's own step follows it, as in a training loop.
"""

from collections.abc import Callable, Iterable

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from benches import _report
from benches._case import OURS, PLAIN, Case, Method, Provider
from benches._device import failure
from benches._measure import Effort, measure
from benches._providers import prepare

#: The case of each method, by the end of its setting; those of ``(64, 100)`` otherwise.
SETTINGS = {"flexmatch": "N = 50,000", "mean_teacher": "MobileNet v2", "self_tuning": "C = 100"}
BASE = "network"
HEADS = ["", "", "network alone", "with plain", "with ours", "share of plain", "share of ours"]


def run(methods: Iterable[Method], effort: Effort, device: str) -> None:
    """Print the table."""
    rows = []
    for method in methods:
        for case in _chosen(method):
            try:
                rows.append([method.stem, case.setting, *_figures(method.stem, case, effort, device)])
            except Exception as error:
                _report.print_verdicts([failure(case, error)])
    print(tabulate(rows, HEADS, disable_numparse=True))


def _figures(stem: str, case: Case, effort: Effort, device: str) -> list[str]:
    """The figures in a row of the table."""
    providers, _ = prepare(case, compiled=False, device=device)
    network = network_step(device)
    steps = {name: Provider(_both(network, providers[name].step), None) for name in (PLAIN, OURS)}
    steps[BASE] = Provider(network, None)
    times = measure(steps, effort, label=stem, sub_label=case.setting)
    base, plain, ours = (times[name].median for name in (BASE, PLAIN, OURS))
    shares = (f"{max(0.0, 1 - base / whole):.1%}" for whole in (plain, ours))
    return [*map(_report.seconds, (base, plain, ours)), *shares]


def _chosen(method: Method) -> list[Case]:
    setting = SETTINGS.get(method.stem, "(64, 100)")
    cases = [case for case in method.cases if case.setting.endswith(setting)]
    # The triplet losses are over features.
    return cases + [case for case in method.cases if case.setting.endswith("triplet (64, 2048)")]


def _both(network: Callable[[], None], method: Callable[[], object]) -> Callable[[], None]:
    def step():
        network()
        method()

    return step


def network_step(device: str, classes: int = 100) -> Callable[[], None]:
    """One step of supervised training."""
    torch.manual_seed(0)
    layers, inputs = [], 3
    for outputs in (32, 64, 128):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).to(
        device
    )
    images = torch.randn(64, 3, 32, 32, device=device)
    labels = torch.arange(64, device=device) % classes
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step
