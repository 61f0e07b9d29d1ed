"""The CUDA kernels without a device: every source compiles for every architecture, and its results are
checked by the methods' own tests, on the CPU, through the same launches."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.again import begun, passes_again
from tests.cuda import ELEMENTS, SOURCES, bounds_watch, build_emulator
from tllib_rs import _core

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
DTYPES = ["float32", "float16", "bfloat16"]
STEMS = sorted(path.stem for path in SOURCES.glob("*.cu"))
#: The forms of a kernel, by the macro in common.cuh that makes them.
FORMS = {
    "": (),
    "ROW_": ("128", "256", "512", "1024", "2048", "4096", "any"),
    "FEW_ROWS_": ("128", "1024", "4096", "any"),
}
#: The tests that every loss goes through.
EVERY_LOSS = ["test_losses.py", "test_compiled_losses.py", "test_on_device.py"]
#: The tests that are run once more through the kernels: files, and the selection of tests in them. What takes
#: longest is first: as many as there are processors run at a time.
METHODS = {
    # Bad input is rejected before any kernel is chosen, and in that file includes that of other losses. Features are
    # always written once as the kernels read them.
    "triplet": (
        ["test_reid_loss.py", "test_reid_loss_on_device.py", *EVERY_LOSS],
        "(triplet or test_reid_loss) and not half_types_notice and not bad_input and not labels_are_checked "
        "and not read_where_it_is",
    ),
    # Not labels that are no columns: on a device they are not checked for (tests/test_on_device.py).
    "cross_entropy": (
        ["test_reid_loss.py", *EVERY_LOSS],
        "cross_entropy or label_smooth or targets_that_changed or empty_batches or nan",
    ),
    "dst": (["test_dst.py", *EVERY_LOSS], "dst"),
    "entropy": (["test_entropy.py", *EVERY_LOSS], "entropy and not cross_entropy"),
    "mcc": (["test_mcc.py", "test_mcc_on_device.py", *EVERY_LOSS], "mcc"),
    "pi_model": (["test_pi_model.py", *EVERY_LOSS], "pi_model"),
    "pseudo_label": (["test_pseudo_label.py", *EVERY_LOSS], "pseudo_label"),
    # Values out of range abort a device, and are checked for on the CPU only.
    "flexmatch": (
        ["test_flexmatch.py", "test_states_on_device.py"],
        # The memory of the process includes the sanitizer's here. Samples are counted in operations of libtorch,
        # whose threads do not survive a fork.
        "not bad_update and not bad_get_threshold and not hundred_million and not fork_while "
        "and not made_in_a_dispatch_mode",
    ),
    "mean_teacher": (
        [
            "test_mean_teacher.py",
            "test_mean_teacher_state.py",
            "test_mean_teacher_training.py",
            "test_states_on_device.py",
        ],
        "",
    ),
    "hardest": (["test_reid_loss.py", "test_reid_loss_on_device.py"], "mining or hard_examples"),
    # Raising if a mean is not a probability would wait for the device.
    "self_ensemble": (
        ["test_self_ensemble.py", "test_self_ensemble_on_device.py", *EVERY_LOSS],
        "(self_ensemble or class_balance) and not (bad_probabilities or mean_above_1)",
    ),
    # Nor are labels checked within a dispatch mode.
    "self_tuning": (["test_self_tuning.py", "test_self_tuning_on_device.py"], "not labels_are_checked"),
    "uda": (["test_uda.py", *EVERY_LOSS], "uda"),
}


def test_every_source_is_in_the_extension():
    assert sorted(_core.cuda_sources()) == STEMS


def figures(log):
    """(kernel, registers, bytes spilled) from the output of ptxas."""
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = re.findall(r"(\d+) bytes spill stores", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert len(kernels) == len(spills) == len(registers) > 0
    return list(zip(kernels, map(int, registers), map(int, spills), strict=True))


@pytest.fixture(scope="module")
def compiled(request):
    """The output of ptxas, by capability and element type."""

    def run(stem):
        return {(c, d): _core.cuda_compile(stem, d, c) for c in CAPABILITIES for d in DTYPES}

    yield from begun(request, run)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("stem", STEMS)
def test_compiles(stem, capability, compiled, capsys):
    if torch.version.cuda is None:
        pytest.skip("NOT RUN: this build of torch brings no NVRTC")
    lines = []
    for dtype in DTYPES:
        for kernel, registers, spilled in figures(compiled[stem].result()[capability, dtype]):
            lines.append(f"{kernel} {dtype}: {registers} registers, {spilled} bytes spilled")
            # ptxas spills a few bytes to run more threads at once; an array in memory would be many.
            assert spilled <= 64, lines[-1]
    with capsys.disabled():
        print(f"\nsm_{capability[0]}{capability[1]} {stem}.cu", *lines, sep="\n  ")


@pytest.mark.parametrize("stem", ["uda", "triplet_gradient"])
def test_compiles_for_the_oldest_device(stem):
    """Which has no single instruction for the maximum."""
    if torch.version.cuda is None:
        pytest.skip("NOT RUN: this build of torch brings no NVRTC")
    assert figures(_core.cuda_compile(stem, "float32", (7, 5)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match='no source "nothing"'):
        _core.cuda_compile("nothing", "float32", (9, 0))
    with pytest.raises(ValueError, match='no kernels for "float64"'):
        _core.cuda_compile("scale", "float64", (9, 0))


def test_a_toolkit_on_the_path_is_not_taken(tmp_path):
    """It may be newer than the driver; torch brings what fits."""
    if torch.version.cuda is None:
        pytest.skip("NOT RUN: this build of torch brings no NVRTC")
    toolkit = tmp_path / "libnvrtc.so"
    subprocess.run(["cc", "-shared", "-x", "c", "-o", toolkit, "/dev/null"], check=True)
    code = "from tllib_rs import _core; assert _core.cuda_compile('scale', 'float32', (9, 0))"
    path = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"LD_LIBRARY_PATH": path}, check=True)


def test_what_nvrtc_needs_is_found_without_torch():
    """torch opens it when it is imported, and carries on if it cannot."""
    if torch.version.cuda is None:
        pytest.skip("NOT RUN: this build of torch brings no NVRTC")
    code = """
import ctypes

class Refusing(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        if "nvrtc" in str(name):
            raise OSError(f"{name}: not here")
        super().__init__(name, *arguments, **options)

ctypes.CDLL = Refusing
from tllib_rs import _core

assert "libnvrtc-builtins" not in open("/proc/self/maps").read()
assert _core.cuda_compile("scale", "float32", (9, 0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The library of the kernels for the CPU."""
    return build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def emulated(request, emulator):
    """Runs with CPU tensors treated as CUDA tensors, each of which returns the kernels that it launched."""

    environment = bounds_watch() | {"TLLIB_RS_CUDA": "1", "TLLIB_RS_CUDA_EMULATOR": str(emulator)}

    def run(stem):
        launches = emulator.with_name(f"{stem}-launches")
        passes_again(*METHODS[stem], environment | {"TLLIB_EMULATED_LAUNCHES": str(launches)})
        return {line.split()[0] for line in launches.read_text().splitlines()}

    yield from begun(request, run)


@pytest.mark.parametrize("stem", METHODS)
def test_methods_through_the_kernels(stem, emulated):
    """The method's tests pass again, and launch each of its kernels (in <stem>.cu and <stem>_*.cu) in each of its
    element types. A race ends the process, as does an access out of bounds."""
    launched = emulated[stem].result()
    for own in (s for s in STEMS if s == stem or s.startswith(f"{stem}_")):
        source = (SOURCES / f"{own}.cu").read_text()
        for macro, kernel in re.findall(r"^(\w*)KERNEL\((?:\d+, )?(\w+)", source, re.MULTILINE):
            expected = [f"{kernel}_{form}" for form in FORMS[macro]] or [kernel]
            # A source that does not name its element type is launched as float32.
            elements = ELEMENTS if re.search(r"\bE\b", source) else ("f32",)
            names = [f"{own}/{e}/{k}" for e in elements for k in expected]
            missing = [name for name in names if name not in launched]
            assert not missing, f"never launched: {missing}"
