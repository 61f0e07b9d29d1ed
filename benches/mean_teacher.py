"""The moving average of a teacher, over models with the parameters of well-known ones."""

import copy

import torch
from torch import nn

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, original
from tests.plain.mean_teacher import EMATeacher as Plain
from tllib_rs.self_training.mean_teacher import EMATeacher

ALPHA = 0.99
FOREACH = "foreach"


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


def _case(name, model, **options) -> Case:
    def set_up():
        torch.manual_seed(0)
        # All teachers start from `before` and follow one student.
        before, student = model(), model()

        def teacher_of(kind):
            teacher = kind(before, ALPHA)
            teacher.model = student
            return teacher

        def provider(step, parameters):
            def result():
                step()
                step()
                return [p.detach().clone() for p in parameters]

            return Provider(step, result)

        tllib = original("self_training.mean_teacher")
        kinds = {OURS: EMATeacher, PLAIN: Plain, TLLIB: tllib and tllib.EMATeacher}
        teachers = {name: teacher_of(kind) for name, kind in kinds.items() if kind}
        providers = {name: provider(t.update, list(t.teacher.parameters())) for name, t in teachers.items()}

        # The lists are made once, which a class that follows replaced sub-modules cannot do.
        averages = [p.detach() for p in copy.deepcopy(before).parameters()]
        sources = [p.detach() for p in student.parameters()]
        providers[FOREACH] = provider(lambda: torch._foreach_lerp_(averages, sources, 1 - ALPHA), averages)

        size = sum(p.numel() for p in sources)
        target, source = torch.zeros(size), torch.ones(size)
        return providers | {LIMIT: Provider(lambda: target.lerp_(source, 1 - ALPHA), None)}

    return Case(name, set_up, **options)


METHOD = Method(
    "mean_teacher",
    [
        _case("ResNet-50", resnet50, bars={PLAIN: 3.0, FOREACH: 1.0}, quick=False),
        _case("MobileNet v2", mobilenet_v2),
        _case("1,000 tiny tensors", tiny),
    ],
)
