"""What the methods that keep a state do on a device: EMATeacher over tensors of any mix at once, FlexMatch
with exact counts. Run like tests/test_on_device.py, which has the losses."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.on_device import DEVICE, KERNELS, gpu, inductor, never_waiting, placed, somewhere
from tests.plain.flexmatch import DynamicThresholdingModule as Plain
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
from tllib_rs.self_training.mean_teacher import EMATeacher

pytestmark = somewhere

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Less than 16 bytes, one element more than a chunk may have, and many chunks.
SIZES = (1, 3, 8, 2048, 2049, 30_011)


def parameters(tensors):
    return nn.ParameterList([nn.Parameter(placed(t)) for t in tensors])


def averaged(teacher, student, alpha):
    """In float32, rounded after each operation and to the teacher's dtype."""
    return (teacher.float() * alpha + student.float() * (1 - alpha)).to(teacher.dtype)


def every_mix(generator):
    """Each pair of dtypes in each size, as tensors of their own and one element into a larger one."""
    teachers, students = [], []
    for teacher in DTYPES:
        for student in DTYPES:
            for size in SIZES:
                for offset in (0, 1):
                    t, s = torch.randn(2, size + offset, generator=generator)
                    teachers.append(t.to(teacher)[offset:])
                    students.append(s.to(student)[offset:])
    return teachers, students


def start(teachers, students, alpha):
    """An EMATeacher with these values; ``nn.Parameter`` keeps the offset into the memory."""
    ema = EMATeacher(parameters(students), alpha)
    ema.teacher = parameters(teachers)
    return ema


def assert_values(module, expected, exact=True, steps=3):
    """Unless ``exact``, each of the ``steps`` may round three times where the expected values were rounded once."""
    for got, wanted in zip(module.parameters(), expected, strict=True):
        got, where = got.detach().cpu(), (got.dtype, got.shape, got.storage_offset())
        if exact:
            assert torch.equal(got, wanted), where
        else:
            rtol, atol = 1.5 * steps * torch.finfo(got.dtype).eps, torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, msg=lambda m, w=where: f"{w}: {m}")


def test_mean_teacher_of_every_mix_of_dtypes_sizes_and_alignments(generator):
    teachers, students = every_mix(generator)
    ema = start([t.clone() if t.storage_offset() == 0 else t for t in teachers], students, 0.9)
    expected = [t.clone() for t in teachers]
    for _ in range(3):
        ema.update()
        expected = [averaged(t, s, 0.9) for t, s in zip(expected, students, strict=True)]
    # Without kernels torch adds a multiple, which may round only once, and rounds half precision after each
    # operation.
    assert_values(ema.teacher, expected, exact=KERNELS)


def test_mean_teacher_keeps_nan_and_infinities():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0, 1e-7, 0.0] * 3)
    for teacher in DTYPES:
        for student in DTYPES:
            t, s = values.to(teacher), values.flip(0).to(student)
            ema = start([t.clone()], [s], 0.5)
            ema.update()
            torch.testing.assert_close(
                ema.teacher[0].detach().cpu(), averaged(t, s, 0.5), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.skipif(KERNELS, reason="about libtorch's operations, which are not asked for")
def test_mean_teacher_without_kernels_is_two_operations_for_all_of_a_dtype(generator):
    teachers = [torch.randn(5, 3, generator=generator) for _ in range(40)]
    ema = start([t.clone() for t in teachers], teachers, 0.9)
    ema.teacher[7].data = ema.teacher[7].data.double()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as recorded:
        ema.update()
    called = [event.name for event in recorded.events() if event.cpu_parent is None]
    assert called == ["aten::_foreach_mul_", "aten::_foreach_add_"] * 2


def test_mean_teacher_sees_parameters_that_moved_and_many_models(generator):
    """More models in turn than tables are kept, and parameters with new memory in between."""
    models = []
    for k in range(12):
        teachers, students = ([torch.randn(7 + k, generator=generator) for _ in range(3)] for _ in range(2))
        models.append((start([t.clone() for t in teachers], students, 0.75), teachers, students))
    for turn in range(4):
        for ema, teachers, students in models:
            if turn == 2:
                students[1] = torch.randn(len(students[1]), generator=generator)
                ema.model[1].data = students[1].to(DEVICE).clone()
                ema.teacher[0].data = ema.teacher[0].data.clone()
            ema.update()
            teachers[:] = [averaged(t, s, 0.75) for t, s in zip(teachers, students, strict=True)]
            assert_values(ema.teacher, teachers)


def test_mean_teacher_with_pairs_that_no_kernel_averages(generator):
    """float64 and differing layouts besides pairs that a kernel averages, each averaged once."""
    values = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    ema = start([values[0].clone(), values[0].float(), values[0].float()],
                [values[1], values[1].float().t().contiguous().t(), values[1].float()], 0.75)  # fmt: skip
    versions = [p._version for p in ema.teacher]
    ema.update()
    expected = averaged(values[0].float(), values[1].float(), 0.75)
    torch.testing.assert_close(ema.teacher[0].detach().cpu(), 0.75 * values[0] + 0.25 * values[1])
    assert_values(ema.teacher[1:], [expected, expected])
    assert all(p._version > before for p, before in zip(ema.teacher, versions, strict=True))


@gpu
@pytest.mark.parametrize("warm", [False, True])
def test_mean_teacher_captured_and_replayed(warm, generator):
    """With a table from before the capture, and with one of the graph's own."""
    teachers, students = every_mix(generator)
    start([torch.ones(1)], [torch.ones(1)], 0.9).update()  # compiles
    ema = start(teachers, students, 0.9)
    expected = teachers
    if warm:
        ema.update()
        expected = [averaged(t, s, 0.9) for t, s in zip(expected, students, strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    for _ in range(3):
        graph.replay()
        expected = [averaged(t, s, 0.9) for t, s in zip(expected, students, strict=True)]
    assert_values(ema.teacher, expected, exact=KERNELS, steps=3 + warm)


@gpu
def test_mean_teacher_never_waits(generator):
    ema = start(*every_mix(generator), 0.9)
    ema.update()
    ema.model[0].data = ema.model[0].data.clone()
    with never_waiting():
        ema.update()


@gpu
@inductor
def test_mean_teacher_compiled_with_graphs(generator):
    """The memory that the update keeps is not among what a graph gives to others."""
    teachers, students = every_mix(generator)
    ema = start(teachers, students, 0.9)
    update = torch.compile(ema.update, mode="reduce-overhead", fullgraph=True)
    expected = [t.clone() for t in teachers]
    for _ in range(4):  # a first run, one that is recorded, and replays
        update()
        expected = [averaged(t, s, 0.9) for t, s in zip(expected, students, strict=True)]
    assert_values(ema.teacher, expected, exact=KERNELS, steps=4)


def convex(x):
    return x / (2 - x)


def both(classes, samples, warmup=False, dtype=torch.int64):
    """Ours on the device, and plain on the CPU."""
    ours = DynamicThresholdingModule(0.95, warmup, convex, classes, samples, DEVICE, dtype=dtype)
    return ours, Plain(0.95, warmup, convex, classes, samples, "cpu")


def assert_same(ours, plain, labels):
    """Thresholds, labels, and counts, which are kept up to date without reading all labels."""
    assert torch.equal(ours.get_threshold(labels.to(DEVICE)).cpu(), plain.get_threshold(labels))
    counts = ours.class_counts().cpu()
    assert torch.equal(ours.net_outputs.long().cpu(), plain.net_outputs)
    assert torch.equal(counts, torch.bincount(plain.net_outputs + 1, minlength=len(counts)))


MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
         torch.float16, torch.bfloat16, torch.float32, torch.float64)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_flexmatch_with_masks_and_labels_of_every_dtype(dtype, generator):
    ours, plain = both(100, 40, dtype=dtype)
    for step, mask in enumerate(4 * MASKS):
        kind = (torch.int32, torch.int64)[step % 2]
        # 1 is selected; 2, 0 and what is near 1 are not.
        values = torch.randint(3, (70,), generator=generator)
        chosen = values.to(mask)
        if mask.is_floating_point:
            chosen = torch.where(values == 2, 1 + 2 * torch.finfo(mask).eps, chosen)
        idxes = torch.randint(-40, 40, (70,), generator=generator).to(kind)
        labels = torch.randint(-1, 100, (70,), generator=generator).to(kind)
        ours.update(idxes.to(DEVICE), chosen.to(DEVICE), labels.to(DEVICE))
        plain.update(idxes.long(), chosen, labels.long())
        assert_same(ours, plain, labels)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("batch", [1, 31, 1024, 1025, 4096, 5000])
def test_flexmatch_of_large_batches_full_of_equal_indices(batch, warmup, generator):
    """Up to the rows that a block has, and beyond; more classes than a block has threads."""
    classes, samples = 1500, batch // 3 + 1
    ours, plain = both(classes, samples, warmup)
    for _ in range(3):
        idxes = torch.randint(samples, (2 * batch,), generator=generator)[::2]
        # Few distinct labels, so that earlier ones recur.
        labels = torch.randint(4, (3, batch), generator=generator).t()[:, 1] * 499
        mask = (torch.rand(batch, generator=generator) < 0.6).float()
        ours.update(*(placed(x) for x in (idxes, mask, labels)))
        # One by one: torch's own assignment leaves open which of many equal indices wins.
        for index, chosen, label in zip(idxes.tolist(), mask.tolist(), labels.tolist(), strict=True):
            if chosen == 1:
                plain.net_outputs[index] = label
        assert_same(ours, plain, labels)


def test_flexmatch_indices_that_hash_alike(generator):
    """Indices that differ by multiples of the table's size, in any order."""
    ours, plain = both(5, 1 << 20)
    for step in (1, 1 << 10, 1 << 13):
        idxes = torch.randint(100, (300,), generator=generator) * step
        labels = torch.randint(5, (300,), generator=generator)
        ours.update(idxes.to(DEVICE), torch.ones(300, device=DEVICE), labels.to(DEVICE))
        plain.update(idxes, torch.ones(300), labels)
        assert_same(ours, plain, labels)


def test_flexmatch_status_of_labels_of_any_shape(generator):
    ours, plain = both(6, 30)
    ours.update(*(x.to(DEVICE) for x in (torch.arange(9), torch.ones(9), torch.arange(9) % 4)))
    plain.update(torch.arange(9), torch.ones(9), torch.arange(9) % 4)
    labels = torch.randint(-6, 6, (5, 4, 3000), generator=generator)
    for view in (
        labels,
        labels.transpose(0, 2),
        labels[0, 0, ::7],
        labels[:, 1, 2],
        labels[0, 0, 0],
        labels[:0],
    ):
        for kind in (torch.int32, torch.int64):
            got = ours.get_threshold(placed(view.to(kind)))
            assert torch.equal(got.cpu(), plain.get_threshold(view))
            assert got.shape == view.shape


def test_flexmatch_counts_keep_their_memory(generator):
    """After a write from outside, the new counts go into the memory that kernels and captured graphs know."""
    ours, plain = both(4, 50)
    for step in range(5):
        idxes, labels = (torch.randint(n, (9,), generator=generator) for n in (50, 4))
        ours.update(*(x.to(DEVICE) for x in (idxes, torch.ones(9), labels)))
        plain.update(idxes, torch.ones(9), labels)
        ours.net_outputs[step:7] = step % 4
        plain.net_outputs[step:7] = step % 4
        assert_same(ours, plain, labels)


BAD = {
    "index": "module.update(tensor([50]), ones, tensor([0]))",
    "negative index": "module.update(tensor([-51]), ones, tensor([0]))",
    "label": "module.update(tensor([0]), ones, tensor([4]))",
    "negative label": "module.update(tensor([0]), ones, tensor([-2]))",
    "status": "module.get_threshold(tensor([4]))",
}


@pytest.mark.parametrize("bad", BAD)
def test_flexmatch_out_of_range_stops_the_device(bad):
    """No device is usable after that, so another process tries it."""
    script = f"""
import torch
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule
def tensor(values):
    return torch.tensor(values, device="{DEVICE}")
module, ones = DynamicThresholdingModule(0.9, False, abs, 4, 50, "{DEVICE}"), tensor([1])
module.update(tensor([49]), ones, tensor([3]))
module.update(tensor([-50]), ones, tensor([-1]))
module.update(tensor([99]), 0 * ones, tensor([99]))
assert module.class_counts().tolist() == [49, 0, 0, 0, 1]
print("alive", flush=True)
{BAD[bad]}
print("still alive", module.class_counts().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == "alive\n", done.stderr[-2000:]


def flexmatch_step(ours, idxes, mask, labels):
    thresholds = ours.get_threshold(labels)
    ours.update(idxes, mask, labels)
    return thresholds


def random_batch(generator):
    return [
        torch.randint(200, (64,), generator=generator).to(DEVICE),
        (torch.rand(64, generator=generator) < 0.5).float().to(DEVICE),
        torch.randint(10, (64,), generator=generator).to(DEVICE),
    ]


@gpu
def test_flexmatch_never_waits(generator):
    ours, _ = both(10, 200)
    batch = random_batch(generator)
    flexmatch_step(ours, *batch)
    with never_waiting():
        flexmatch_step(ours, *batch)


@gpu
@inductor
def test_flexmatch_compiled_with_graphs(generator):
    """Its steps are no part of a graph: a write from outside is noticed."""
    ours, plain = both(10, 200)
    step = torch.compile(lambda *batch: flexmatch_step(ours, *batch), mode="reduce-overhead", fullgraph=True)
    for turn in range(6):
        batch = random_batch(generator)
        expected = flexmatch_step(plain, *(x.cpu() for x in batch))
        torch.testing.assert_close(step(*batch).cpu(), expected)
        ours.net_outputs[turn:9] = turn
        plain.net_outputs[turn:9] = turn
    assert_same(ours, plain, batch[2].cpu())


def captured_step(ours, plain, generator):
    """A step of both, then one that is captured: its inputs, the graph, and the thresholds that it writes."""
    static = random_batch(generator)
    flexmatch_step(ours, *static)
    plain.update(*(x.cpu() for x in static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flexmatch_step(ours, *static)
    return static, graph, captured


@gpu
def test_flexmatch_captured_and_replayed(generator):
    """Each replay continues from the counts and labels of the last one, and so does what is not captured."""
    ours, plain = both(10, 200)
    static, graph, captured = captured_step(ours, plain, generator)
    for _ in range(5):
        fresh = random_batch(generator)
        for x, value in zip(static, fresh, strict=True):
            x.copy_(value)
        expected = plain.get_threshold(fresh[2].cpu())
        graph.replay()
        assert torch.equal(captured.cpu(), expected)
        plain.update(*(x.cpu() for x in fresh))
        assert_same(ours, plain, torch.arange(10))


@gpu
def test_flexmatch_written_between_replays(generator):
    """A graph does not look for such writes. The next call outside of it does, and counts into the memory that
    the graph reads."""
    ours, plain = both(10, 200)
    static, graph, captured = captured_step(ours, plain, generator)
    for turn in range(3):
        for module in (ours, plain):
            module.net_outputs[30 * turn : 30 * turn + 60] = turn
        ours.get_threshold(static[2])
        for _ in range(2):
            expected = plain.get_threshold(static[2].cpu())
            graph.replay()
            assert torch.equal(captured.cpu(), expected)
            plain.update(*(x.cpu() for x in static))
    assert_same(ours, plain, torch.arange(10))
