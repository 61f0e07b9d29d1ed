"""Self-tuning's step between the encoders: logits against the queue, their backward pass, the new keys.

The encoders give projections that were made before, so that what is timed is the method; the momentum
update has its benchmark in ``mean_teacher``. A fixed gradient stands for the user's loss. The limit is the
product with the queue, the one of its backward pass, and one pass over the logits.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from benches._case import LIMIT, OURS, PLAIN, TLLIB, Case, Method, Provider, faster, seeded, within
from benches._providers import original
from tests.plain import self_tuning as plain
from tllib_rs.self_training.self_tuning import SelfTuning

CLASSES = [10, 100, 200]
ROWS, DIM, KEYS, TEMPERATURE = 32, 1024, 32, 0.07
PLAIN_BAR, LIMIT_BAR = 30.0, 1.6


class Given(nn.Module):
    """An encoder whose projections are its input."""

    projection_dim = DIM

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Plain(nn.Module):
    """The plain step in the form of the class."""

    def __init__(self, encoder_q, encoder_k, num_classes, K, T):
        super().__init__()
        self.K, self.T = K, T
        self.queue_list = torch.empty(encoder_q.projection_dim, K * num_classes)
        self.queue_ptr = torch.zeros(num_classes, dtype=torch.long)

    def forward(self, im_q, im_k, labels):
        out = plain.step(im_q, im_k, labels, self.queue_list, self.queue_ptr, self.K, self.T)
        targets = torch.zeros_like(out)
        targets[:, : self.K + 1] = 1 / (self.K + 1)
        return out, targets, im_q


def _case(classes: int) -> Case:
    def set_up():
        generator = seeded()

        def unit(*shape, dim):
            return F.normalize(torch.randn(*shape, generator=generator), dim=dim)

        queue = unit(DIM, KEYS * classes, dim=0)
        queries, keys = unit(ROWS, DIM, dim=1), unit(ROWS, DIM, dim=1)
        labels = torch.randint(classes, (ROWS,), generator=generator)
        gradient = torch.randn(ROWS, 1 + KEYS * classes, generator=generator) / ROWS

        def provider(kind):
            module = kind(Given(), Given(), classes, K=KEYS, T=TEMPERATURE)
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

    # Every row of the plain formulation copies the queue, and C = 10 has no bar.
    bars: Sequence = [faster(PLAIN, PLAIN_BAR), within(LIMIT, LIMIT_BAR)] if classes > CLASSES[0] else ()
    return Case(f"C = {classes}", set_up, bars, quick=classes == CLASSES[0], sizes={"C": classes})


METHOD = Method("self_tuning", [_case(classes) for classes in CLASSES])
