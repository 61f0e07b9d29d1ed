"""EMATeacher and SelfTuning of networks that ``fully_shard`` spread over two processes."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.ranks import run_ranks
from tllib_rs.self_training.mean_teacher import EMATeacher
from tllib_rs.self_training.self_tuning import SelfTuning

STEPS, ALPHA = 6, 0.8


class Net(nn.Module):
    """Rows that two ranks share unevenly, a tied weight, a buffer."""

    def __init__(self, width=6, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(width, 2 * width + 1, dtype=dtype)
        self.norm = nn.LayerNorm(2 * width + 1, dtype=dtype)
        self.last = nn.Linear(2 * width + 1, width, dtype=dtype)
        self.again = self.first
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.again(self.last(self.norm(self.first(x)).tanh()))


def shard(net, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (net.last, net):
        fully_shard(module, mesh=mesh, **options)
    return net


def made_before(student):
    """The teacher is a copy of the whole student; both are sharded then."""
    teacher = EMATeacher(student, ALPHA)
    shard(student)
    shard(teacher.teacher)
    return teacher


def handed_in(student):
    """The teacher is another network, sharded likewise, with other initial parameters."""
    other = Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return EMATeacher(shard(student), ALPHA, teacher=shard(other))


MAKERS = {"made_before": made_before, "handed_in": handed_in}


def train(student, teacher, batches):
    """A consistency loss against the teacher, so that wrong teachers show in the student too."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for x in batches:
        with torch.no_grad():
            target = teacher(x)
        (student(x).square().mean() + (student(x) - target - 1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update()


def whole(net):
    """All parameters, gathered."""
    from torch.distributed.tensor import DTensor

    assert all(isinstance(p, DTensor) for p in net.parameters())
    return [p.full_tensor().detach().numpy() for p in net.parameters()]


def _sharded_training(rank, maker, data):
    student = Net()
    teacher = MAKERS[maker](student)
    batches = torch.from_numpy(data)
    train(student, teacher, batches.chunk(2, 1)[rank])
    # An evaluation leaves gathered copies in the outermost module; the update must reach the shards.
    with torch.no_grad():
        teacher(batches[0])
        student(batches[0])
    teacher.update()
    student.reshard()
    return whole(student), whole(teacher.teacher)


@pytest.mark.parametrize("maker", MAKERS)
def test_equals_the_unsharded_teacher(maker):
    data = torch.randn(STEPS, 8, 6, dtype=torch.float64)
    student = Net()
    teacher = EMATeacher(student, ALPHA)
    train(student, teacher, data)
    teacher.update()
    assert not torch.allclose(teacher.teacher.first.weight, student.first.weight)
    for ours in run_ranks(2, _sharded_training, maker, data.numpy()):
        for got, net in zip(ours, (student, teacher.teacher), strict=True):
            for value, expected in zip(got, net.parameters(), strict=True):
                torch.testing.assert_close(torch.from_numpy(value), expected.detach(), rtol=1e-12, atol=1e-12)


def _allocated(action):
    """Bytes that torch allocated during an action."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def _collectives(action):
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        action()
    return mode.get_total_counts()


def _costs(rank):
    student = shard(Net(width=256, dtype=torch.float32))
    teacher = EMATeacher(student, ALPHA, teacher=shard(Net(width=256, dtype=torch.float32)))
    x = torch.randn(2, 256)
    student(x).sum().backward()
    with torch.no_grad():
        teacher(x)
    actions = teacher.update, student.last.weight.full_tensor
    local = [p.to_local().numel() * 4 for p in student.parameters()]
    return [(_allocated(action), _collectives(action)) for action in actions], max(local)


def test_nothing_is_gathered_or_allocated():
    for ((allocated, collectives), gathered), largest in run_ranks(2, _costs):
        assert collectives == 0
        assert allocated < largest / 100
        # The measurements would detect a gather: one gathered weight is as large as two shards.
        assert gathered[0] > 1.9 * largest
        assert gathered[1] == 1


def _messages(rank):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def net():
        return nn.Sequential(nn.Linear(4, 4, bias=False))

    def sharded(mesh=(0, 1), **options):
        made = net()
        fully_shard(made, mesh=DeviceMesh("cpu", list(mesh)), **options)
        return made

    student = sharded()
    attempts = {
        "copied": lambda: EMATeacher(student, 0.5),
        "placements": lambda: EMATeacher(
            student, 0.5, teacher=sharded(shard_placement_fn=lambda _: Shard(1))
        ),
        "mesh": lambda: EMATeacher(student, 0.5, teacher=sharded((1, 0))),
        "plain teacher": lambda: EMATeacher(student, 0.5, teacher=net()),
        "plain student": lambda: EMATeacher(net(), 0.5, teacher=sharded()),
    }
    # Sharded on one side after the teacher was made: the next update raises, and changes nothing.
    late = net()
    teacher = EMATeacher(late, 0.5)
    before = teacher.teacher[0].weight.clone()
    fully_shard(late, mesh=DeviceMesh("cpu", [0, 1]))
    attempts["late"] = teacher.update
    raised = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            raised[name] = str(error)
    assert torch.equal(teacher.teacher[0].weight, before)
    return raised


def test_what_does_not_correspond_raises():
    both = "must be sharded on both sides or on neither, got a DTensor in the"
    expected = {
        "copied": "a model that fully_shard was called on cannot be copied; shard a second network",
        "placements": r"teacher parameter must have the student's placements (Shard(dim=0),), got (Shard(dim=1),)",
        "mesh": "teacher parameter must be on the student's mesh [0, 1], got [1, 0]",
        "plain teacher": f"{both} student and a plain tensor in the teacher, of shape [4, 4]",
        "plain student": f"{both} teacher and a plain tensor in the student",
        "late": "teacher and student must be sharded alike",
    }
    for raised in run_ranks(2, _messages):
        assert set(raised) == set(expected)
        for name, message in expected.items():
            assert message in raised[name], name


class Pair(nn.Module):
    """Student and teacher within one network."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = Net(), Net()
        self.within = lambda: None

    def forward(self, x):
        self.within()
        return self.student(x), self.teacher(x)


def whole_pair(pair):
    from torch.distributed.fsdp import fully_shard

    fully_shard(pair)


def parts_and_pair(pair):
    from torch.distributed.fsdp import fully_shard

    for module in (pair.student.last, pair.teacher.last, pair):
        fully_shard(module)


def _within_another(rank, before, shard_pair, data):
    pair = Pair()
    made = [EMATeacher(pair.student, ALPHA, teacher=pair.teacher)] if before else []
    shard_pair(pair)
    teacher = made[0] if before else EMATeacher(pair.student, ALPHA, teacher=pair.teacher)
    x = torch.from_numpy(data)
    pair(x)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(1)
        pair(x)  # keeps what it gathered
    teacher.update()
    moved = whole(pair.teacher)
    pair.within = teacher.update
    with pytest.raises(RuntimeError, match="within the forward of a module that fully_shard was called on"):
        pair(x)
    return moved


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shard_pair", [whole_pair, parts_and_pair])
def test_gathered_by_a_module_around_it(shard_pair, before):
    with torch.no_grad():
        expected = [p + (1 - ALPHA) for p in Net().parameters()]
    data = torch.randn(8, 6, dtype=torch.float64).numpy()
    for got in run_ranks(2, _within_another, before, shard_pair, data):
        for value, weight in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), weight, rtol=1e-12, atol=1e-12)


class Encoder(nn.Module):
    projection_dim = 6

    def __init__(self):
        super().__init__()
        self.projection, self.head = nn.Linear(4, 6), nn.Linear(4, 5)

    def forward(self, x):
        return nn.functional.normalize(self.projection(x), dim=1), self.head(x)


def self_tuning(shard):
    torch.manual_seed(1)
    model = SelfTuning(Encoder(), Encoder(), 5, K=4, m=0.5)
    shard(model)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=1.0)
    losses = []
    for _ in range(4):
        x = torch.randn(8, 4)
        pgc_logits, pgc_labels, _ = model(x, x, torch.arange(8) % 5)
        loss = nn.functional.kl_div(pgc_logits, pgc_labels, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _self_tuning(rank):
    from torch.distributed.fsdp import fully_shard

    def encoders(model):
        fully_shard(model.encoder_q)
        fully_shard(model.encoder_k)

    def all_of_them(model):
        encoders(model)
        model.more = nn.Parameter(torch.ones(2))  # which the outermost one keeps gathered
        fully_shard(model)

    def heads_and_model(model, **options):
        fully_shard(model.encoder_q.head, **options)
        fully_shard(model.encoder_k.head, **options)
        fully_shard(model, **options)

    for shard in (fully_shard, heads_and_model):
        with pytest.raises(RuntimeError, match="lost; shard it with reshard_after_forward=True"):
            self_tuning(shard)
    reshard = {"reshard_after_forward": True}
    return [
        self_tuning(encoders),
        self_tuning(all_of_them),
        self_tuning(lambda model: fully_shard(model, **reshard)),
        self_tuning(lambda model: heads_and_model(model, **reshard)),
    ]


def test_self_tuning_moves_the_shards_of_its_key_encoder():
    expected = self_tuning(lambda model: None)
    for ours in run_ranks(2, _self_tuning):
        for losses in ours:
            assert losses == pytest.approx(expected, rel=1e-5)


def _compiled(rank):
    import torch.distributed.tensor

    student = Net()
    teacher = EMATeacher(student, ALPHA)
    expected = [p.clone() for p in teacher.teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    torch.compile(teacher.update, backend="aot_eager", fullgraph=True)()
    for parameter, before in zip(teacher.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, before + (1 - ALPHA))


def test_compiled_beside_a_process_group():
    run_ranks(1, _compiled)
