"""Self-tuning's step between the encoders: logits against the queue, their backward pass, the new keys.

The encoders give projections that were made before, so that what is timed is the method; the momentum
update has its benchmark in ``mean_teacher``. A fixed gradient stands for the user's loss. The limit is the
product with the queue, the one of its backward pass, and one pass over the logits.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, faster, seeded, within
from benches._families import Drawn, in_some_dtype, log_uniform
from benches._providers import original
from tests.plain import self_tuning as plain
from tllib_rs.self_training.self_tuning import SelfTuning

CLASSES = [10, 100, 200]
TEMPERATURE = 0.07
#: The most that plain copies in a setting that is drawn at random.
ELEMENTS = 1 << 26
PLAIN_BAR, LIMIT_BAR = 30.0, 1.6


class Given(nn.Module):
    """An encoder whose projections are its input."""

    def __init__(self, projection_dim: int):
        super().__init__()
        self.projection_dim = projection_dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Plain(nn.Module):
    """The plain step in the form of the class."""

    def __init__(self, encoder_q, encoder_k, num_classes, K, T):
        super().__init__()
        self.K, self.T = K, T
        self.register_buffer("queue_list", torch.empty(encoder_q.projection_dim, K * num_classes))
        self.queue_ptr = torch.zeros(num_classes, dtype=torch.long)

    def forward(self, im_q, im_k, labels):
        out = plain.step(im_q, im_k, labels, self.queue_list, self.queue_ptr, self.K, self.T)
        targets = torch.zeros_like(out)
        targets[:, : self.K + 1] = 1 / (self.K + 1)
        return out, targets, im_q


@dataclasses.dataclass(frozen=True)
class Setting:
    """The sizes of a step."""

    classes: int
    rows: int = 32
    dim: int = 1024
    #: Of each class.
    keys: int = 32

    @property
    def queue(self) -> tuple[int, int]:
        """Its shape."""
        return self.dim, self.keys * self.classes


def _set_up(setting: Setting, dtype: torch.dtype = torch.float32) -> Callable[[], Mapping[str, Provider]]:
    def set_up():
        generator = seeded()

        def unit(*shape, dim):
            return F.normalize(torch.randn(*shape, generator=generator).to(dtype), dim=dim)

        queue = unit(*setting.queue, dim=0)
        queries, keys = (unit(setting.rows, setting.dim, dim=1) for _ in range(2))
        labels = torch.randint(setting.classes, (setting.rows,), generator=generator)
        gradient = torch.randn(setting.rows, 1 + queue.shape[1], generator=generator).to(dtype) / setting.rows

        def provider(kind):
            encoders = (Given(setting.dim), Given(setting.dim))
            module = kind(*encoders, setting.classes, K=setting.keys, T=TEMPERATURE).to(dtype)
            module.queue_list.copy_(queue)
            h_q = queries.clone().requires_grad_()

            def step():
                h_q.grad = None
                out, targets, _ = module(h_q, keys, labels)
                out.backward(gradient)
                return out, targets

            def result():
                step()
                out, targets = step()
                state = [module.queue_list.clone(), module.queue_ptr.clone()]
                return [out.detach(), targets, h_q.grad.clone(), *state]

            return Provider(step, result)

        kinds = {OURS: SelfTuning, PLAIN: Plain, TLLIB: original("self_training.self_tuning", "SelfTuning")}
        own = queue.clone()

        def limit():
            logits = queries @ own
            logits.mul_(1 / TEMPERATURE)
            return logits @ own.T

        providers = {name: provider(kind) for name, kind in kinds.items() if kind}
        return providers | {LIMIT: Provider(limit, None)}

    return set_up


def _case(classes: int) -> Case:
    # Every row of the plain formulation copies the queue, and C = 10 has no bar.
    bars: Sequence = [faster(PLAIN, PLAIN_BAR), within(LIMIT, LIMIT_BAR)] if classes > CLASSES[0] else ()
    set_up = _set_up(Setting(classes))
    return Case(f"C = {classes}", set_up, bars, quick=classes == CLASSES[0], sizes={"C": classes})


def _drawn(generator: random.Random) -> Drawn:
    def case(dtype, tolerance):
        text = f"{setting}, {dtype}".removeprefix("Setting")
        return Case(text, _set_up(setting, dtype), tolerances={OURS: tolerance})

    # An own key and one of another class are the least that there is to tell apart.
    largest = {"classes": 1000, "rows": 256, "dim": 2048, "keys": 64}
    while True:
        setting = Setting(**{name: log_uniform(generator, 2, most) for name, most in largest.items()})
        # The plain formulation copies the queue for each row.
        if setting.rows * math.prod(setting.queue) <= ELEMENTS:
            return in_some_dtype(case, generator.choice([torch.float32] * 3 + [torch.float64]))


METHOD = Method("self_tuning", [_case(classes) for classes in CLASSES], families=[_drawn])
