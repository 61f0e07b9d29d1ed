"""FlexMatch on several gloo ranks equals one process with the concatenated batch."""

import copy
import json
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Died, run_ranks
from tests.test_flexmatch import convex
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

CLASSES, SAMPLES, STEPS = 5, 60, 50
EVERY = torch.arange(CLASSES)


def make(samples=SAMPLES, classes=CLASSES, threshold=0.95, **settings):
    return DynamicThresholdingModule(threshold, True, convex, classes, samples, "cpu", **settings)


def batches(step, ranks):
    """What each rank sees: sizes from none to more than the first buffer has room for, sometimes nothing
    selected, samples that occur twice on one rank and on several."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for rank in range(ranks):
        size = (0, 7, 13, 120 + 3 * step)[(step + rank) % 4] if step % 9 else 0
        idxes = torch.randint(SAMPLES, (size,), generator=generator)
        mask = (torch.rand(size, generator=generator) < 0.6).float()
        if (step + rank) % 5 == 0:
            mask.zero_()
        made.append((idxes, mask, torch.randint(CLASSES, (size,), generator=generator)))
    return made


def concatenated(parts):
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def shard(rank, ranks):
    """Uneven shards of consecutive samples: where one begins and ends."""
    edges = [SAMPLES * r * (r + 1) // (ranks * (ranks + 1)) for r in range(ranks + 1)]
    return edges[rank], edges[rank + 1]


def _own(parts, rank, ranks, layout):
    """A rank's batch of this step: its own part, or everything about samples of its shard."""
    if layout == "replicated":
        return parts[rank]
    begin, end = shard(rank, ranks)
    idxes, mask, labels = concatenated(parts)
    mine = (begin <= idxes) & (idxes < end)
    return idxes[mine] - begin, mask[mine], labels[mine]


def _outside_write(module, step, begin=0, end=SAMPLES):
    if step % 8 == 3:
        full = torch.arange(SAMPLES) % (CLASSES + 1) - 1
        module.net_outputs[:] = full[begin:end].to(module.dtype)


def _steps(rank, layout, dtype):
    ranks = dist.get_world_size()
    begin, end = shard(rank, ranks) if layout == "sharded" else (0, SAMPLES)
    module = make(end - begin, process_group=dist.group.WORLD, layout=layout, dtype=dtype)
    seen = []
    for step in range(STEPS):
        idxes, mask, labels = _own(batches(step, ranks), rank, ranks, layout)
        thresholds = module.get_threshold(labels)
        module.update(idxes, mask, labels)
        kept = module.net_outputs if step % 7 == 0 and rank == 0 else None
        if rank == step % ranks:
            module.class_counts()  # one rank may look on its own, without the others
        x = torch.ones(1)
        dist.all_reduce(x)  # and it does not interfere with other collectives of the group
        _outside_write(module, step, begin, end)
        if layout == "sharded" and step % 8 == 3:
            module.synchronize()
        every = module.get_threshold(EVERY)
        seen.append((thresholds, every, module.class_counts(), module.net_outputs.clone()))
        del kept
    assert module.net_outputs.dtype == dtype
    return seen


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        (2, "replicated", torch.int64),
        (4, "replicated", torch.int8),
        (2, "sharded", torch.int16),
        (4, "sharded", torch.int64),
    ],
)
def test_fifty_steps_equal_one_process(ranks, layout, dtype):
    per_rank = run_ranks(ranks, _steps, layout, dtype)
    single = make()
    for step, seen in enumerate(zip(*per_rank, strict=True)):
        parts = batches(step, ranks)
        for rank, (thresholds, *_) in enumerate(seen):
            assert torch.equal(thresholds, single.get_threshold(_own(parts, rank, ranks, layout)[2])), step
        single.update(*concatenated(parts))
        _outside_write(single, step)
        for _, every, counts, outputs in seen:
            assert torch.equal(every, single.get_threshold(EVERY)), step
            assert torch.equal(counts, single.class_counts())
            if layout == "replicated":
                assert torch.equal(outputs.long(), single.net_outputs)
        if layout == "sharded":
            assert torch.equal(torch.cat([outputs for *_, outputs in seen]).long(), single.net_outputs)
    assert single.class_counts()[0] < SAMPLES


def _held(rank):
    """Whoever holds net_outputs sees a step at once, and may write after it."""
    module = make(process_group=dist.group.WORLD)
    held = module.net_outputs
    ones = torch.ones(1)
    module.update(torch.tensor([rank]), ones, torch.tensor([rank + 1]))
    at_once = held[:2].tolist()
    held[0] = 4
    module.get_threshold(EVERY)
    return at_once, module.net_outputs[:2].tolist()


def test_a_held_reference_is_in_step():
    assert run_ranks(2, _held) == [([1, 2], [4, 2])] * 2


def _message(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _in_a_fork(module, idxes):
    """What a forked worker gets while its parent waits for the other rank; ``None`` if it waits as well."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        step = (idxes, torch.ones(len(idxes)), idxes)
        counts, thresholds = module.class_counts().tolist(), module.get_threshold(idxes).tolist()
        load = _message(module.load_state_dict, module.state_dict())
        told = [counts, thresholds, _message(module.update, *step), _message(module.synchronize), load]
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told and json.loads(told)


def _forked(rank, layout):
    module, idxes = make(process_group=dist.group.WORLD, layout=layout), torch.arange(2)
    module.update(idxes, torch.ones(2), idxes + 2)
    before = module.class_counts().tolist(), module.get_threshold(idxes).tolist()
    if rank == 0:
        module.update(idxes + 2, torch.ones(2), idxes)
        told = _in_a_fork(module, idxes)
        dist.barrier()
    else:
        dist.barrier()
        module.update(idxes + 2, torch.ones(2), idxes)
        told = None
    return before, told, module.class_counts().tolist()


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_process_forked_in_the_middle_of_an_exchange_does_not_wait_for_it(layout):
    (before, told, counts), (*_, of_other) = run_ranks(2, _forked, layout)
    assert told is not None, "waits for ever"
    seen, thresholds, *messages = told
    assert (seen, thresholds) == before
    assert all("a process forked from a rank cannot do" in message for message in messages)
    assert counts == of_other != before[0]


def _differing(rank):
    world, mine = dist.group.WORLD, rank == 1
    return [
        _message(make, process_group=world, classes=CLASSES + mine),
        _message(make, process_group=world, samples=SAMPLES + mine),
        _message(make, process_group=world, dtype=torch.int8 if mine else torch.int64),
        _message(make, process_group=world, layout="sharded" if mine else "replicated"),
        _message(make, process_group=world, threshold=0.9 if mine else 0.95),
        _message(make, process_group=world, samples=SAMPLES + mine, layout="sharded"),
    ]


def test_ranks_that_differ_are_told_all():
    start = "ValueError: DynamicThresholdingModule: the ranks differ in "
    expected = [
        f"{start}num_classes: 5 on rank 0, 6 on rank 1",
        f"{start}n_unlabeled_samples: 60 on rank 0, 61 on rank 1",
        f"{start}dtype: torch.int64 on rank 0, torch.int8 on rank 1",
        f"{start}layout: replicated on rank 0, sharded on rank 1",
        f"{start}threshold: 0.95 on rank 0, 0.9 on rank 1",
        None,
    ]
    assert run_ranks(2, _differing) == [expected] * 2


def _killed(rank, layout):
    module = make(process_group=dist.group.WORLD, layout=layout)
    batch = torch.arange(3), torch.ones(3), torch.arange(3)
    module.update(*batch)
    module.get_threshold(EVERY)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()

    def step():
        module.update(*batch)
        module.get_threshold(EVERY)

    first, second = _message(step), _message(module.class_counts)
    return first, second, time.monotonic() - start


@pytest.mark.parametrize(("ranks", "layout"), [(2, "sharded"), (4, "replicated")])
def test_a_killed_rank_ends_the_others(ranks, layout):
    results = run_ranks(ranks, _killed, layout, dying=[1], group_timeout=5)
    assert results.pop(1) == Died(-signal.SIGKILL)
    for first, second, seconds in results:
        assert first.startswith("RuntimeError: DynamicThresholdingModule: the exchange between the ranks")
        assert second == first, "the ranks may have gone apart: nothing is answered any more"
        assert seconds < 10


def _late(rank):
    time.sleep(1.0 * rank)
    module = make(process_group=dist.group.WORLD)
    if rank == 0:  # the other never takes the step
        module.update(torch.arange(3), torch.ones(3), torch.arange(3))
        return _message(module.get_threshold, EVERY)
    time.sleep(9)
    return None


def test_late_ranks_are_waited_for_until_the_time_out():
    message, _ = run_ranks(2, _late, group_timeout=6)
    assert "the exchange between the ranks failed" in message
    assert "Timed out" in message


def _bad_input(rank, layout):
    module = make(process_group=dist.group.WORLD, layout=layout)
    ones = torch.ones(1)
    message = None
    if rank == 1:
        message = _message(module.update, torch.tensor([SAMPLES]), ones, torch.tensor([0]))
    module.update(torch.tensor([rank]), ones, torch.tensor([rank]))
    pickled = _message(copy.deepcopy, module)
    return message, module.class_counts().tolist()[:3], pickled


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_bad_input_sends_nothing_so_that_the_rank_may_try_again(layout):
    (none, *first), (message, *second) = run_ranks(2, _bad_input, layout)
    assert none is None
    assert message.startswith("IndexError: DynamicThresholdingModule: idxes must be in")
    all_samples = SAMPLES * (2 if layout == "sharded" else 1)
    assert first[0] == second[0] == [all_samples - 2, 1, 1]
    assert first[1].startswith("TypeError: DynamicThresholdingModule: a module with a process group")


def _loads(rank, layout):
    ranks = dist.get_world_size()
    module = make(process_group=dist.group.WORLD, layout=layout, dtype=torch.int8)
    module.update(torch.arange(9), torch.ones(9), torch.full((9,), rank))
    state, before = module.state_dict(), module.get_threshold(EVERY)
    other = make(process_group=dist.group.WORLD, layout=layout)
    other.load_state_dict(state)
    same = torch.equal(other.get_threshold(EVERY), before)
    wrong_size = _message(other.load_state_dict, torch.zeros(SAMPLES + 1, dtype=torch.int64))
    others = torch.full((SAMPLES,), rank)
    return same, wrong_size, _message(other.load_state_dict, others), other.class_counts().tolist(), ranks


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_states_load_on_all_ranks(layout):
    for same, wrong_size, differing, counts, _ in run_ranks(2, _loads, layout):
        assert same
        assert wrong_size.startswith("ValueError: DynamicThresholdingModule: net_outputs must have shape")
        if layout == "sharded":
            assert differing is None
            assert counts == [0, SAMPLES, SAMPLES, 0, 0, 0]
        else:
            assert "RuntimeError: DynamicThresholdingModule: net_outputs differs between ranks" in differing


def _in_a_part(rank):
    """Ranks 1 and 2 of three."""
    part = dist.new_group([1, 2])
    if rank == 0:
        return _message(make, process_group=part)
    module = make(process_group=part)
    module.update(torch.tensor([0]), torch.ones(1), torch.tensor([rank]))
    return int(module.net_outputs[0])


def test_a_part_of_the_world():
    outside, *inside = run_ranks(3, _in_a_part)
    assert inside == [2, 2], "the last rank's word"
    assert outside == "ValueError: DynamicThresholdingModule: this process is not a member of process_group"


def test_alone():
    with pytest.raises(ValueError, match="layout must be one of 'replicated', 'sharded', got 'split'"):
        make(layout="split")
    module = make(layout="sharded")
    module.synchronize()
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup"):
        make(process_group="gloo")
