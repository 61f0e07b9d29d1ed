"""Values recorded from the original tllib 0.4, and the rule by which ours are accepted (see README.md).

``cases("mcc")`` yields the cases of a method; a :class:`Case` gives its inputs as tensors in the
precision under test and checks outputs and gradients against tllib's float64 run.
"""

import functools
import json
import math
import pathlib

import numpy as np
import torch

_HERE = pathlib.Path(__file__).parent
_BITS = {torch.float32: 32, torch.float64: 64}


@functools.cache
def manifest():
    """The manifest: what each case holds."""
    return json.loads((_HERE / "manifest.json").read_text())


@functools.cache
def _arrays(method):
    return np.load(_HERE / f"{method}.npz")


class Case:
    """One recorded call."""

    def __init__(self, entry):
        self.entry = entry
        self.name = entry["case"]
        self.ctor = entry["ctor"]
        self.flags = entry.get("flags") or []
        self.grad_out = entry.get("grad_out")
        self.raises = entry.get("raises")

    def __repr__(self):
        return f"{self.entry['method']}/{self.name}"

    def array(self, key):
        """A recorded array by its key."""
        return _arrays(self.entry["method"])[key]

    def inputs(self, dtype):
        """All inputs by name: floating point in ``dtype``, others as recorded."""
        return {name: self.input(name, dtype) for name in self.entry["inputs"]}

    def input(self, name, dtype):
        """One input, a fresh tensor."""
        tensor = torch.from_numpy(self.array(self.entry["inputs"][name]["key"]).copy())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def backward(self, output, inputs, dtype):
        """Run backward from ``output`` with the recorded incoming gradient."""
        if isinstance(self.grad_out, str):
            (output * inputs[self.grad_out.removeprefix("input:")]).sum().backward()
        else:
            (output * self.grad_out).backward()

    def check(self, name, value, dtype):
        """Assert that an output is accepted."""
        self._check(self.entry["outputs"][name], value, dtype, name)

    def check_drawn(self, name, value):
        """Assert that float32 numbers were drawn as tllib draws them. torch draws the recorded bits on processors
        with AVX2 and AVX-512; on others it rounds elsewhere on the way from uniform to normal numbers (off by
        3.6e-7 at most)."""
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            self.check(name, value, torch.float32)
        else:
            own = self.array(self.entry["outputs"][name]["key32"])
            np.testing.assert_allclose(value, own, rtol=0, atol=1e-6, err_msg=f"{self}: {name}")

    def check_grad(self, name, grad, dtype):
        """Assert that a gradient is accepted; ``None`` where tllib leaves none."""
        entry = self.entry["grads"][name]
        if entry is None:
            assert grad is None, f"{self}: tllib gives no gradient for {name}"
        else:
            self._check(entry, grad, dtype, f"grad {name}")

    def check_grads(self, inputs, dtype):
        """Assert the gradient of every input that has an entry."""
        for name in self.entry["grads"]:
            self.check_grad(name, inputs[name].grad, dtype)

    def requires_grad(self, inputs):
        """Make leaves of the inputs whose gradients were recorded, also of those without one."""
        for name in self.entry["grads"]:
            inputs[name].requires_grad_()
        return inputs

    def _check(self, entry, value, dtype, what):
        bits = _BITS[dtype]
        got = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        assert list(got.shape) == entry["shape"], f"{self}: {what} has shape {got.shape}"
        if entry["compare"] == "exact":
            own = self.array(entry.get(f"key{bits}", entry["key64"]))
            np.testing.assert_array_equal(got, own, err_msg=f"{self}: {what}")
            return
        tolerance = entry["tol64"] if bits == 64 else entry.get("tol32_reorder", entry["tol32"])
        if tolerance is None:
            return  # tllib's own float32 run is not finite where float64 is: anything is acceptable
        error = _error(got.astype(np.float64), self.array(entry["key64"]).astype(np.float64))
        assert error <= tolerance, f"{self}: {what} is off by {error:.3g}, accepted {tolerance:.3g}"


def _error(got, reference):
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(got)):
        return math.inf
    if not np.array_equal(got[~finite], reference[~finite], equal_nan=True):
        return math.inf
    return float(np.abs(got[finite] - reference[finite]).max(initial=0.0))


def cases(method, where=lambda case: True):
    """The cases of ``method`` that ``where`` accepts, for ``pytest.mark.parametrize``."""
    found = [Case(e) for e in manifest()["cases"] if e["method"] == method]
    return [case for case in found if where(case)]
