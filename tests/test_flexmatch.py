"""FlexMatch's dynamic thresholds."""

import copy
import ctypes
import io
import math
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import golden
from tests.plain.flexmatch import DynamicThresholdingModule as Plain
from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

MAPPINGS = {
    "x / (2 - x)": lambda x: x / (2 - x),
    "x": lambda x: x,
    "torch.log(x + 1) / math.log(2)": lambda x: torch.log(x + 1) / math.log(2),
}


def convex(x):
    return x / (2 - x)


def make(classes=5, samples=50, warmup=False, cls=DynamicThresholdingModule, **settings):
    return cls(0.95, warmup, convex, classes, samples, "cpu", **settings)


@pytest.mark.parametrize("case", golden.cases("flexmatch"), ids=repr)
def test_golden(case):
    # tllib computes the status in float32 whatever the default dtype: float32 is what users get.
    ctor = case.ctor | {"mapping_func": MAPPINGS[case.ctor["mapping_func"]]}
    module = DynamicThresholdingModule(**ctor)
    inputs = case.inputs(torch.float32)
    every = torch.arange(ctor["num_classes"])
    if "initial" in case.entry["outputs"]:
        case.check("initial", module.get_threshold(every), torch.float32)
    thresholds, outputs, class_thresholds = [], [], []
    for idxes, mask, labels in zip(
        *(inputs[k] for k in ("idxes", "selected_mask", "pseudo_labels")), strict=True
    ):
        thresholds.append(module.get_threshold(labels))
        module.update(idxes, mask, labels)
        outputs.append(module.net_outputs.clone())
        class_thresholds.append(module.get_threshold(every))
    case.check("thresholds", torch.stack(thresholds), torch.float32)
    case.check("net_outputs", torch.stack(outputs), torch.float32)
    case.check("class_thresholds", torch.stack(class_thresholds), torch.float32)


def random_step(generator, samples, classes, batch=16):
    idxes = torch.randint(samples, (batch,), generator=generator)
    mask = torch.rand(batch, generator=generator) < 0.4
    labels = torch.randint(classes, (batch,), generator=generator)
    kind = (torch.float32, torch.bool, torch.int64)[int(torch.randint(3, (), generator=generator))]
    return idxes, mask.to(kind), labels


@pytest.mark.parametrize("warmup", [False, True])
def test_ten_thousand_steps_with_outside_writes_equal_a_recount(generator, warmup):
    """Every way of writing from outside that torch has, between ordinary steps."""
    samples, classes = 60, 4
    ours, plain = make(classes, samples, warmup), make(classes, samples, warmup, Plain)
    every = torch.arange(classes)
    kept = []
    for step in range(10_000):
        batch = random_step(generator, samples, classes)
        assert torch.equal(ours.get_threshold(batch[2]), plain.get_threshold(batch[2])), step
        ours.update(*batch)
        plain.update(*batch)
        k, label = step % samples, step % classes
        match int(torch.randint(40, (), generator=generator)):
            case 0:
                ours.net_outputs[k] = label
                plain.net_outputs[k] = label
            case 1:
                ours.net_outputs.data.fill_(label)
                plain.net_outputs.fill_(label)
            case 2:
                ours.net_outputs.numpy()[k:] = -1
                plain.net_outputs[k:] = -1
            case 3:
                fresh = torch.randint(-1, classes, (samples,), generator=generator)
                ours.net_outputs = fresh
                plain.net_outputs = fresh.clone()
            case 4:
                # An alias that lives on is written later, in ways that no version counter sees.
                kept = [ours.net_outputs.numpy(), ours.net_outputs.detach().data, ours.net_outputs[k:]]
            case 5 if kept:
                kept[0][k] = label
                kept[1][0] = label
                kept[2].fill_(label)
                current = ours.net_outputs.clone()
                plain.net_outputs = current
            case 6:
                kept = []
        if step % 50 == 0:
            assert torch.equal(ours.net_outputs, plain.net_outputs)
        assert torch.equal(ours.get_threshold(every), plain.get_threshold(every)), step


NARROW = {torch.int8: 128, torch.int16: 32_768, torch.int32: None}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_narrow_labels_are_the_same_labels(generator, dtype, on_device):
    """Steps, outside writes and loads, with the highest class that the dtype holds in use."""
    from tllib_rs import _core

    classes = NARROW[dtype] or 40_000
    wide, narrow = make(classes, 200), make(classes, 200, dtype=dtype)
    if on_device:  # the steps of other devices, here on the CPU
        narrow._state = _core.FlexMatch(classes, 200, "cpu", True, dtype)
        narrow._ranks._state = narrow._state
    for step in range(200):
        batch = random_step(generator, 200, classes)
        batch[2][step % 16] = classes - 1
        for module in (wide, narrow):
            module.update(*batch)
            if step % 7 == 0:
                module.net_outputs[step % 50 :: 9] = classes - 1
            if step % 11 == 0:
                # As an optimizer's checkpoint would: also into the other dtype.
                module.load_state_dict(wide.state_dict())
        assert torch.equal(wide.get_threshold(batch[2]), narrow.get_threshold(batch[2])), step
        assert torch.equal(wide.class_counts(), narrow.class_counts())
        assert torch.equal(wide.net_outputs, narrow.net_outputs.long())
    assert narrow.net_outputs.dtype == narrow.state_dict()["net_outputs"].dtype == dtype
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.class_counts(), narrow.class_counts())
    assert copy.deepcopy(narrow).net_outputs.dtype == dtype


@pytest.mark.parametrize(("dtype", "most"), [item for item in NARROW.items() if item[1]], ids=str)
def test_classes_that_do_not_fit(dtype, most):
    with pytest.raises(
        ValueError, match=rf"dtype {dtype} holds the labels of at most {most} classes, got num_classes = "
    ):
        make(most + 1, dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype must be torch.int8, int16, int32 or int64, got torch.uint8"):
        make(dtype=torch.uint8)
    module = make(dtype=dtype)
    # 256 and 65,536 more than a class: in the narrow type they would be one.
    for stray in (2**8 + 1, 2**16 + 1):
        with pytest.raises(IndexError, match=f"got {stray} at position 3"):
            module.load_state_dict(torch.tensor([-1, -1, -1, stray] + [0] * 46))
    with pytest.raises(TypeError, match=f"net_outputs must be {str(dtype)[6:]}, got int64"):
        module.net_outputs = torch.zeros(50, dtype=torch.int64)
    assert (module.net_outputs == -1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_million_samples_take_a_byte_each():
    samples = 100_000_000
    make(dtype=torch.int8).class_counts()
    before = _resident()
    module = make(100, samples, dtype=torch.int8)
    # The last sample too, and counts that no narrow type would hold.
    module.update(torch.tensor([0, samples - 1]), torch.ones(2), torch.tensor([99, 99]))
    assert (_resident() - before) / samples < 1.1
    module.net_outputs[5:] = 7
    expected = [4, *[samples - 5 if c == 7 else int(c == 99) for c in range(100)]]
    assert module.class_counts().tolist() == expected
    start = time.perf_counter()
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    fresh = make(100, samples, dtype=torch.int8)
    fresh.load_state_dict(torch.load(saved))
    assert time.perf_counter() - start < 20
    assert fresh.class_counts().tolist() == expected


def _resident():
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def test_alias_written_behind_every_counter():
    module = make()
    alias = module.net_outputs.numpy()
    module.get_threshold(torch.tensor([0]))
    for label in (1, 2, 3):
        alias[:10] = label
        alias[10:15] = 0
        assert module.class_counts().tolist() == [35, 5, *[10 if c == label else 0 for c in (1, 2, 3, 4)]]


def _of_numpy(_):
    return torch.from_numpy(np.full(10, -1))


def _of_a_file(path):
    np.full(10, -1).tofile(path)
    return torch.from_file(str(path), shared=True, size=10, dtype=torch.int64)


def _of_processes(_):
    return torch.full((10,), -1).share_memory_()


@pytest.mark.parametrize("make", [_of_numpy, _of_a_file, _of_processes])
def test_labels_in_memory_that_torch_did_not_allocate(make, tmp_path):
    """Whoever writes them holds no reference to the tensor: they are counted at every step."""
    module = DynamicThresholdingModule(0.9, True, lambda x: x, 3, 10, "cpu")
    labels = make(tmp_path / "labels")
    address = labels.data_ptr()
    module.net_outputs = labels
    del labels
    assert module.class_counts().tolist() == [10, 0, 0, 0]
    (ctypes.c_int64 * 10).from_address(address)[:6] = [1] * 6
    assert module.class_counts().tolist() == [4, 0, 6, 0]
    index = torch.arange(10)
    module.update(index, torch.ones(10), torch.zeros(10, dtype=torch.int64))
    assert module.class_counts().tolist() == [0, 10, 0, 0]


def test_labels_that_torch_loaded_are_ours_alone():
    file = io.BytesIO()
    torch.save(torch.arange(10) % 3, file)
    file.seek(0)
    module = DynamicThresholdingModule(0.9, True, lambda x: x, 3, 10, "cpu")
    module.net_outputs = torch.load(file)
    module.get_threshold(torch.tensor([0]))
    assert not module._state.is_shared()
    assert not module._state.is_stale()


def test_counts_are_trusted_again_when_the_alias_is_gone():
    module = make()
    labels = module.net_outputs
    labels[0] = 3
    assert module._state.is_stale()
    module.get_threshold(torch.tensor([0]))
    assert module._state.is_stale(), "an alias is alive"
    del labels
    module.get_threshold(torch.tensor([0]))
    assert not module._state.is_stale()
    torch.save(module.net_outputs, io.BytesIO())
    module.net_outputs.numpy().sum()
    module.get_threshold(torch.tensor([0]))
    assert not module._state.is_stale(), "reading leaves nothing behind"


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_masks_of_every_numeric_dtype(dtype):
    module = make()
    module.update(
        torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 1, 0]).to(dtype), torch.tensor([4, 3, 2, 1])
    )
    assert module.net_outputs[:4].tolist() == [4, -1, 2, -1]


class Calls(TorchDispatchMode):
    """Calls ``step`` in every operation."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._step()
        return function(*args, **(kwargs or {}))


def slow():
    """Gives up the GIL in every operation."""
    return Calls(lambda: time.sleep(0.002))


def test_in_a_dispatch_mode():
    """Profilers and activation checkpoints set one."""
    module = make()
    with slow():
        module.load_state_dict({"net_outputs": torch.full((50,), -1)})
        module.update(torch.arange(10)[::2], torch.ones(5), torch.ones(5, dtype=torch.int64))
        assert module.get_threshold(torch.tensor([1, 0])).tolist() == pytest.approx([0.95, 0])
        assert module.class_counts().tolist() == [45, 0, 5, 0, 0, 0]


def test_made_in_a_dispatch_mode():
    with slow():
        module = make()
    module.update(torch.arange(5), torch.ones(5), torch.ones(5, dtype=torch.int64))
    assert module.class_counts().tolist() == [45, 0, 5, 0, 0, 0]
    with pytest.raises(IndexError):
        module.update(torch.tensor([50]), torch.ones(1), torch.ones(1, dtype=torch.int64))


def test_sizes_that_are_numbers_of_numpy():
    module = DynamicThresholdingModule(0.95, True, lambda x: x, np.int32(1000), np.int32(10), "cpu")
    assert (type(module.num_classes), type(module.n_unlabeled_samples)) == (int, int)


@pytest.mark.parametrize("samples", [50, 40_000])
def test_a_dispatch_mode_that_calls_the_module_does_not_wait_for_itself(samples):
    module = make(samples=samples)
    other = make()
    state = {"net_outputs": torch.zeros(samples, dtype=torch.int64)}
    with Calls(other.class_counts):
        module.load_state_dict(state)
    with Calls(module.class_counts), pytest.raises(RuntimeError, match="within a call to the same object"):
        module.load_state_dict(state)
    module.load_state_dict({"net_outputs": torch.ones(samples, dtype=torch.int64)})
    assert module.class_counts().tolist() == [0, 0, samples, 0, 0, 0]


@pytest.mark.parametrize("samples", [50, 40_000])
def test_threads_in_dispatch_modes_do_not_wait_for_each_other_for_ever(samples):
    """Their Python code runs with the module locked."""
    module, idxes = make(samples=samples), torch.arange(10)
    states = [{"net_outputs": torch.full((samples,), k)} for k in range(3)]
    ends = time.monotonic() + 1.5

    def step(state):
        module.load_state_dict(state)
        module.get_threshold(idxes % 5)
        module.update(idxes, torch.ones(10), idxes % 5)
        module.net_outputs = torch.zeros(samples, dtype=torch.int64)

    def plainly():
        while time.monotonic() < ends:
            step(states[0])

    def slowly(k):
        with slow():
            while time.monotonic() < ends:
                step(states[k])

    threads = [
        threading.Thread(target=plainly, daemon=True),
        *(threading.Thread(target=slowly, args=(k,), daemon=True) for k in (1, 2)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "waits for ever"


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("busy", ["count", "assign", "load"])
def test_a_fork_while_another_thread_counts_does_not_wait_for_it(busy):
    module, labels = make(samples=50_000), torch.arange(5)
    over = threading.Event()
    full = torch.zeros(50_000, dtype=torch.int64)
    state = module.state_dict()

    def count():
        module.net_outputs[3] = 1
        module.get_threshold(labels)

    def assign():
        module.net_outputs = full

    def load():
        module.load_state_dict(state)

    def work():
        while not over.is_set():
            {"count": count, "assign": assign, "load": load}[busy]()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(20):
            time.sleep(0.003)
            child = os.fork()
            if not child:
                signal.alarm(10)
                module.get_threshold(labels)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, "waits for ever"
    finally:
        over.set()
        thread.join()


def test_integer_types_negative_indices_and_shapes():
    ours, plain = make(), make(cls=Plain)
    for module in (ours, plain):
        module.update(torch.tensor([-1, -50, 3]), torch.ones(3), torch.tensor([4, 0, 2]))
    assert torch.equal(ours.net_outputs, plain.net_outputs)
    ours.update(torch.tensor([7], dtype=torch.int32), torch.ones(1), torch.tensor([1], dtype=torch.int32))
    assert ours.net_outputs[7] == 1
    plain.net_outputs[7] = 1
    labels = torch.tensor([[0, 1], [-1, 4]])
    assert torch.equal(ours.get_threshold(labels), plain.get_threshold(labels))
    strided = torch.arange(10)[::2]
    ours.update(strided, torch.ones(10)[::2], torch.arange(10)[::2] % 5)
    assert ours.net_outputs[:10:2].tolist() == [0, 2, 4, 1, 3]
    empty = torch.zeros(0, dtype=torch.int64)
    ours.update(empty, torch.zeros(0), empty)
    assert ours.get_threshold(empty).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"idxes": [0, 1]}, TypeError, "DynamicThresholdingModule: idxes must be a torch.Tensor, got list"),
        ({"idxes": torch.zeros(2)}, TypeError, "idxes must be int64 or int32, got float32"),
        ({"labels": torch.zeros(2)}, TypeError, "pseudo_labels must be int64 or int32, got float32"),
        (
            {"idxes": torch.zeros(1, 2, dtype=torch.long)},
            ValueError,
            r"idxes must have one dimension, got shape \[1, 2\]",
        ),
        (
            {"mask": torch.ones(3)},
            ValueError,
            r"selected_mask must have the shape of idxes, \[2\], got shape \[3\]",
        ),
        (
            {"labels": torch.tensor([1])},
            ValueError,
            r"pseudo_labels must have the shape of idxes, \[2\], got shape \[1\]",
        ),
        ({"idxes": torch.tensor([0, 50])}, IndexError, r"idxes must be in \[-50, 49\], got 50"),
        ({"idxes": torch.tensor([-51, 0])}, IndexError, r"idxes must be in \[-50, 49\], got -51"),
        ({"labels": torch.tensor([0, 5])}, IndexError, r"pseudo_labels must be in \[-1, 4\], got 5"),
        ({"labels": torch.tensor([-2, 0])}, IndexError, r"pseudo_labels must be in \[-1, 4\], got -2"),
        (
            {"mask": torch.ones(2, device="meta")},
            RuntimeError,
            "selected_mask must be on the device of idxes",
        ),
        (
            {"mask": torch.ones(2, dtype=torch.complex64)},
            TypeError,
            "selected_mask must hold real numbers or booleans, got a complex dtype",
        ),
    ],
)
def test_bad_update_changes_nothing(change, error, message):
    module = make()
    module.update(torch.arange(5), torch.ones(5), torch.arange(5))
    before = module.net_outputs.clone(), module.class_counts()
    arguments = {
        "idxes": torch.tensor([7, 8]),
        "mask": torch.ones(2),
        "labels": torch.tensor([1, 1]),
    } | change
    with pytest.raises(error, match=message):
        module.update(*arguments.values())
    assert torch.equal(module.net_outputs, before[0])
    assert torch.equal(module.class_counts(), before[1])


def test_unselected_rows_are_not_checked():
    module = make()
    module.update(torch.tensor([99, 1]), torch.tensor([0.0, 1.0]), torch.tensor([77, 2]))
    assert module.net_outputs[1] == 2


def test_bad_get_threshold_and_net_outputs():
    module = make()
    with pytest.raises(TypeError, match="pseudo_labels must be a torch.Tensor, got int"):
        module.get_threshold(3)
    with pytest.raises(IndexError, match=r"pseudo_labels must be in \[-5, 4\], got 5"):
        module.get_threshold(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"net_outputs must have shape \(n_unlabeled_samples,\) = \[50\]"):
        module.net_outputs = torch.zeros(49, dtype=torch.int64)
    with pytest.raises(TypeError, match="net_outputs must be int64, got int32"):
        module.net_outputs = torch.zeros(50, dtype=torch.int32)
    with pytest.raises(IndexError, match="net_outputs must hold -1 or classes below 5, got 9 at position 0"):
        module.net_outputs = torch.full((50,), 9)
    assert (module.net_outputs == -1).all()
    module.net_outputs[4] = 5
    with pytest.raises(IndexError, match="got 5 at position 4"):
        module.get_threshold(torch.tensor([0]))
    module.net_outputs[4] = 1
    assert module.class_counts()[2] == 1


@pytest.mark.parametrize(("classes", "samples"), [(0, 5), (5, 0), (-1, 5), (2**40, 5), (5, 2**62)])
def test_bad_sizes(classes, samples):
    with pytest.raises(ValueError, match=r"must be an integer in \[1, "):
        make(classes, samples)


@pytest.mark.parametrize(
    ("classes", "samples", "error", "message"),
    [
        (4.0, 5, TypeError, "DynamicThresholdingModule: num_classes must be an integer, got float"),
        (4, 2**70, ValueError, "DynamicThresholdingModule: n_unlabeled_samples must fit into 64 bits"),
    ],
)
def test_sizes_that_are_no_numbers(classes, samples, error, message):
    with pytest.raises(error, match=message):
        make(classes, samples)


def test_assignment_adopts_the_tensor():
    module = make()
    labels = torch.zeros(50, dtype=torch.int64)
    module.net_outputs = labels
    module.update(torch.tensor([3]), torch.ones(1), torch.tensor([2]))
    assert labels[3] == 2
    assert module.net_outputs.data_ptr() == labels.data_ptr()


def test_warmup_may_be_switched():
    module = make()
    module.update(torch.arange(5), torch.ones(5), torch.tensor([0, 0, 0, 1, 1]))
    cold = module.get_threshold(torch.tensor([0]))
    module.warmup = True
    assert module.get_threshold(torch.tensor([0])) < cold


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(through):
    module = make()
    module.update(torch.arange(5), torch.ones(5), torch.arange(5))
    other = through(module)
    assert torch.equal(other.net_outputs, module.net_outputs)
    other.update(torch.tensor([0]), torch.ones(1), torch.tensor([3]))
    assert module.net_outputs[0] == 0
    assert other.class_counts().tolist() == [45, 0, 1, 1, 2, 1]


def test_device_path_agrees(generator):
    """The steps of other devices, here on the CPU: exact counts under duplicates, the last one wins."""
    samples, classes = 20, 4
    ours = _device_state(classes, samples)
    plain = make(classes, samples, cls=Plain)
    for _ in range(300):
        batch = random_step(generator, samples, classes, batch=12)
        ours.update(*batch)
        plain.update(*batch)
        assert torch.equal(ours.net_outputs, plain.net_outputs)
        every = torch.arange(classes)
        assert torch.equal(0.95 * convex(ours.status(every, False)), plain.get_threshold(every))


def _device_state(classes, samples):
    from tllib_rs import _core

    return _core.FlexMatch(classes, samples, "cpu", True)


def test_counts_on_a_device_outlive_an_inference():
    """What is made under inference mode can never be written outside of it."""
    state = _device_state(5, 20)
    ones, labels = torch.ones(3), torch.arange(3)
    for step in range(3):
        with torch.inference_mode():
            state.status(labels, False)
        state.update(labels + step, ones, labels)
        assert torch.equal(state.counts(), torch.bincount(state.net_outputs + 1, minlength=6))
        state.net_outputs[7:9] = step
        if step == 1:
            state.net_outputs = torch.zeros(20, dtype=torch.int64)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("how", ["load", "assign", "construct"])
def test_labels_from_an_inference_can_be_written_outside_of_it(how, on_device):
    from tllib_rs import _core

    def fresh():
        return _core.FlexMatch(4, 5, "cpu", on_device)

    state = fresh()
    with torch.inference_mode():
        if how == "load":
            state.load(torch.zeros(5, dtype=torch.int64))
        elif how == "assign":
            state.net_outputs = torch.zeros(5, dtype=torch.int64)
        else:
            state = fresh()
            state.update(torch.arange(5), torch.ones(5), torch.zeros(5, dtype=torch.int64))
    state.update(torch.arange(2), torch.ones(2), torch.tensor([1, 2]))
    state.net_outputs[0] = 3
    assert state.net_outputs.tolist() == [3, 2, 0, 0, 0]
    assert state.counts().tolist() == [0, 3, 0, 1, 1]


def test_a_bad_update_with_counts_on_a_device_changes_nothing():
    state = _device_state(4, 5)
    state.update(torch.arange(2), torch.ones(2), torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="out of"):
        state.update(torch.arange(2), torch.ones(2), torch.tensor([0, 9]))
    assert state.net_outputs.tolist() == [1, 2, -1, -1, -1]
    assert state.counts().tolist() == [3, 0, 1, 1, 0]


@pytest.mark.parametrize("write", ["data", "set_"])
def test_what_is_assigned_to_the_data_of_net_outputs_are_new_labels(write):
    """tllib's ``net_outputs`` is an attribute like any other."""
    module, held = make(3, 6), make(3, 6)
    alias = held.net_outputs
    for labels in ([0, 0, 0, 1, 1, 2], [2, 2, 2, 2, 1, 1]):
        for tensor in (module.net_outputs, alias):
            if write == "data":
                tensor.data = torch.tensor(labels)
            else:
                tensor.set_(torch.tensor(labels))
        counts = [0, *torch.tensor(labels).bincount(minlength=3).tolist()]
        assert module.class_counts().tolist() == counts
        assert module.net_outputs.tolist() == labels
        if labels[0] == 0:
            assert held.class_counts().tolist() == counts
            held.update(torch.tensor([5]), torch.ones(1), torch.tensor([0]))
            assert alias.tolist() == [0, 0, 0, 1, 1, 0]
    fresh = make(3, 6)
    fresh.net_outputs.data = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"net_outputs must have shape .* got shape \[5\]"):
        fresh.class_counts()
    assert fresh.net_outputs.tolist() == [-1] * 6


def test_net_outputs_is_one_tensor_while_it_is_held():
    module = make()
    alias = module.net_outputs
    assert module.net_outputs is alias
    with torch.inference_mode():
        assert module.net_outputs is alias
    module.net_outputs[0] = 1
    assert module.class_counts()[2] == 1


def test_threads_that_read_write_and_count_do_not_wait_for_each_other_for_ever():
    """Dropping a tensor that Python has seen may release the GIL to a thread that waits for the state."""
    code = """
        import threading, time, torch
        from tllib_rs.self_training.flexmatch import DynamicThresholdingModule

        module = DynamicThresholdingModule(0.95, True, lambda x: x, 3, 40_000, "cpu")
        labels, ends = torch.zeros(40_000, dtype=torch.int64), time.monotonic() + 3

        def repeat(step):
            while time.monotonic() < ends:
                step()

        def assign():
            module.net_outputs = labels.clone()

        def write():
            module.net_outputs.data = labels.clone()

        steps = (
            lambda: module.net_outputs,
            lambda: module.net_outputs.untyped_storage(),
            assign,
            write,
            module.class_counts,
            lambda: module.load_state_dict({"net_outputs": labels}),
            lambda: module.get_threshold(labels[:8]),
            lambda: module.update(labels[:1], torch.ones(1), labels[:1]),
        )
        threads = [threading.Thread(target=repeat, args=(step,), daemon=True) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "waits for ever"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_device_of_a_pickle_is_mapped():
    buffer, seen = io.BytesIO(), []
    torch.save(make(), buffer)
    buffer.seek(0)

    def here(storage, location):
        seen.append(location)
        return storage

    loaded = torch.load(buffer, weights_only=False, map_location=here)
    assert (seen, loaded.net_outputs.tolist()) == (["cpu"], [-1] * 50)
