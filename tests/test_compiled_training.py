"""A whole training step under ``torch.compile``, step by step against the plain formulation in eager mode.

Every loss runs through ``aot_eager``, which traces forward and backward as the default backend does and
leaves out only the generated code: that takes a C++ compiler many seconds for each, and our operator is
opaque to it. Two losses, one with an output for each row, go through ``inductor`` as well.
"""

import pytest
import torch

from tests.losses import LOSSES
from tests.trainings import TASKS, Task, assert_same_training, loss_task, plain_step, train

OF_LOSSES, OTHERS = TASKS[: len(LOSSES)], TASKS[len(LOSSES) :]
INDUCTOR = [task for task in OF_LOSSES if task.name in ("mcc", "pi_model_none")]
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def without_dropout(pair):
    """Compiled code draws different random numbers than eager code."""
    for network in pair:
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return pair


def whole_step(backend):
    """The step, compiled from zero_grad to the optimizer. Dynamo breaks the graph at ``backward``, always;
    what comes before is one graph."""
    compiled = torch.compile(plain_step, backend=backend)
    return lambda network, optimizer, batch: compiled(network, optimizer, batch)


def check(task: Task, step):
    ours, plain = without_dropout(task.pair())
    batches = task.batches(STEPS)
    assert_same_training(train(ours, batches, step), train(plain, batches, plain_step))


@pytest.mark.parametrize("task", OF_LOSSES, ids=repr)
def test_network_and_loss_are_one_graph(task):
    def step(network, optimizer, batch):
        optimizer.zero_grad()
        loss = compiled(network, batch)
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(lambda network, batch: network(*batch), fullgraph=True, backend="aot_eager")
    check(task, step)


@pytest.mark.filterwarnings("ignore")  # the compiler's, about itself
@pytest.mark.parametrize("task", INDUCTOR, ids=repr)
def test_whole_step_through_the_default_backend(task):
    check(task, whole_step("inductor"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", [loss_task(LOSSES[1]), *OTHERS], ids=repr)
def test_whole_step_with_graph_breaks(task):
    """FlexMatch, mean teacher and self-tuning keep a state and break the graph, with unchanged results."""
    check(task, whole_step("aot_eager"))
