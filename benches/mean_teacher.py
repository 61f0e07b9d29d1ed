"""The moving average of a teacher, over models with the parameters of well-known ones."""

import copy
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, faster, within
from benches._families import DTYPES, Drawn, in_some_dtype, log_uniform
from benches._providers import original, package
from tests.plain.mean_teacher import EMATeacher as Plain
from tllib_rs.self_training.mean_teacher import EMATeacher

ALPHA = 0.99
FOREACH = "foreach"
#: The most that the walk over the modules and the sweep may cost, relative to one flat sweep.
LIMIT_BAR = 1.1
#: How much faster than ``foreach``, whose lists are made beforehand, the thousand tiny tensors must be.
TINY_BAR = 1.5
#: The most numbers of a model that is drawn at random.
ELEMENTS = 1 << 22


def _unit(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def resnet50() -> nn.Module:
    """The parameters of ResNet-50: 161 tensors, 25,557,032 numbers."""
    layers, inputs = [_unit(3, 64, 7)], 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            units = [_unit(inputs, width, 1), _unit(width, width, 3), _unit(width, 4 * width, 1)]
            if block == 0:
                units.append(_unit(inputs, 4 * width, 1))
            layers.append(nn.Sequential(*units))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.Linear(inputs, 1000))


def mobilenet_v2() -> nn.Module:
    """The parameters of MobileNet v2: 158 tensors, 3,504,872 numbers."""
    layers, inputs = [_unit(3, 32, 3)], 32
    settings = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for expansion, outputs, blocks in settings:
        for _ in range(blocks):
            hidden = expansion * inputs
            units = [_unit(inputs, hidden, 1)] if expansion > 1 else []
            units += [_unit(hidden, hidden, 3, groups=hidden), _unit(hidden, outputs, 1)]
            layers.append(nn.Sequential(*units))
            inputs = outputs
    return nn.Sequential(*layers, _unit(inputs, 1280, 1), nn.Linear(1280, 1000))


def tiny() -> nn.Module:
    """A thousand tensors of 64 or 8 numbers each: all overhead."""
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(500)))


class VisionTransformer(nn.Module):
    """The parameters of ViT-B/16, or of a larger one with heads as wide."""

    def __init__(self, width: int = 768, depth: int = 12, tokens: int = 197):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)


def vit_l() -> nn.Module:
    """The parameters of ViT-L/16."""
    return VisionTransformer(1024, 24)


#: The update of each provider, and the parameters that it changes.
Averages = dict[str, tuple[Callable, Sequence[torch.Tensor]]]


def _teachers(before: nn.Module, student: nn.Module) -> Averages:
    """The class and its equals. All start from ``before`` and follow one student."""
    found = {}
    tllib = original("self_training.mean_teacher", "EMATeacher")
    for name, kind in {OURS: EMATeacher, PLAIN: Plain, TLLIB: tllib}.items():
        if kind:
            teacher = kind(before, ALPHA)
            teacher.model = student
            found[name] = teacher.update, list(teacher.teacher.parameters())
    return found


def _averages(before: nn.Module, student: nn.Module) -> Averages:
    """Also those of other packages."""
    found = _teachers(before, student)
    # The lists are made once, which a class that follows replaced sub-modules cannot do.
    averages = [p.detach() for p in copy.deepcopy(before).parameters()]
    sources = [p.detach() for p in student.parameters()]
    found[FOREACH] = (lambda: torch._foreach_lerp_(averages, sources, 1 - ALPHA)), averages

    swa = AveragedModel(before, multi_avg_fn=get_ema_multi_avg_fn(ALPHA))
    swa.n_averaged.fill_(1)  # the first update would copy
    found["swa_utils"] = (lambda: swa.update_parameters(student)), list(swa.parameters())
    if timm := package("timm.utils"):
        timm_average = timm.ModelEmaV3(before, decay=ALPHA)
        found["timm"] = (lambda: timm_average.update(student)), list(timm_average.module.parameters())
    if ema_pytorch := package("ema_pytorch"):
        ema = _ema_pytorch(ema_pytorch, before, student)
        found["ema_pytorch"] = ema.update, list(ema.ema_model.parameters())
    return found


def _ema_pytorch(module: ModuleType, before: nn.Module, student: nn.Module) -> Any:
    """At a constant decay, in its fastest mode."""
    ema = module.EMA(
        student,
        ema_model=copy.deepcopy(before),
        beta=ALPHA,
        min_value=ALPHA,
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
    )
    ema.initted.fill_(True)  # the first updates would copy
    ema.step.fill_(2)
    return ema


def _provider(step: Callable, parameters: Sequence[torch.Tensor]) -> Provider:
    def result():
        step()
        step()
        return [p.detach().clone() for p in parameters]

    return Provider(step, result)


def _case(name: str, model: Callable[[], nn.Module], **options: Any) -> Case:
    def set_up():
        torch.manual_seed(0)
        before, student = model(), model()
        providers = {name: _provider(*found) for name, found in _averages(before, student).items()}
        size = sum(p.numel() for p in student.parameters())
        target, source = torch.zeros(size), torch.ones(size)
        return providers | {LIMIT: Provider(lambda: target.lerp_(source, 1 - ALPHA), None)}

    return Case(name, set_up, **options)


def _drawn(generator: random.Random) -> Drawn:
    """A model of layers with one to four parameters each."""
    count, largest = log_uniform(generator, 1, 512), log_uniform(generator, 1, 1 << 20)
    sizes = [log_uniform(generator, 1, largest) for _ in range(count)]
    while sum(sizes) > ELEMENTS:
        sizes.pop()
    width = generator.randint(1, 4)

    def case(dtype, tolerance):
        def model():
            parameters = [torch.randn(size).to(dtype) for size in sizes]
            starts = range(0, len(sizes), width)
            return nn.ModuleList(nn.ParameterList(parameters[k : k + width]) for k in starts)

        def set_up():
            torch.manual_seed(0)
            return {name: _provider(*found) for name, found in _teachers(model(), model()).items()}

        text = f"{len(sizes)} tensors, {sum(sizes):,} numbers, {dtype}"
        return Case(text, set_up, tolerances={OURS: tolerance})

    return in_some_dtype(case, generator.choice(DTYPES))


METHOD = Method(
    "mean_teacher",
    [
        _case(
            "ResNet-50",
            resnet50,
            bars=[faster(PLAIN, 3.0), faster(FOREACH, 1.0), within(LIMIT, LIMIT_BAR)],
            quick=False,
        ),
        _case("MobileNet v2", mobilenet_v2),
        _case("ViT-B", VisionTransformer, bars=[within(LIMIT, LIMIT_BAR)], quick=False),
        _case("ViT-L", vit_l, quick=False, on_device=True),
        _case("1,000 tiny tensors", tiny, bars=[faster(FOREACH, TINY_BAR)]),
    ],
    families=[_drawn],
)
