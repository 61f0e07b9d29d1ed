"""The losses as operators of torch, for ``torch.compile``.

Eager calls go straight to the extension. Under ``torch.compile`` a call into an extension would break
the graph, so each method registers the same function here as an opaque operator with a fake
implementation (shapes and dtypes only). :func:`register` is for losses, whose backward scales the stored
gradients, as the eager autograd node does; :func:`define` for everything else.

If there is no kernel for the device, the loss is transparent (:func:`or_transparent`): the compiler sees its
composite in torch's operations, and fuses them with each other and with the surrounding operations.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch

from tllib_rs import __version__, _core, _derivatives
from tllib_rs._derivatives import Backward, SetUp, of_fixed_sizes

_library = torch.library.Library("tllib_rs", "DEF")
_OF_TENSORS = "_of_tensors"
#: The positions of the floats of every operator that has a variant of tensors.
_floats: dict[str, list[int]] = {}
_file = os.stat(_core.__file__)
#: torch caches compiled graphs on disk, keyed by the operators in them. The composition of a transparent one
#: is not part of the key, so this tag, unique to each version and build, is.
_BUILD = f"{__version__}-{_file.st_size:x}-{_file.st_mtime_ns:x}"


def as_number(value: Any) -> Any:
    """A setting that is a NumPy scalar, as the Python number: the compiler takes NumPy's for a tensor. Other
    objects as they are, to be checked where they are used."""
    return value.item() if isinstance(value, np.generic) else value


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    ordered: bool = False,
    recorded: bool = True,
) -> Callable[..., Any]:
    """Define the opaque operator ``tllib_rs::name``, without a gradient, and return it.

    With a float among its arguments there is a second operator, ``tllib_rs::name_of_tensors``, which takes a
    tensor instead. The returned function calls that one if the compiler has made the float a symbol because
    it changes from call to call: the first operator would be recompiled for each value.

    Args:
        name: of the operator.
        schema: arguments and outputs, as in ``(Tensor h_k, Tensor(a!) queue_list) -> ()``.
        compute: what it does to real tensors.
        fake: empty tensors like the outputs of ``compute``, from fake inputs.
        ordered: for operators on state that is not an argument: such calls are neither removed nor reordered,
            and never captured in CUDA graphs.
        recorded: False for operators that keep memory between calls: the CUDA graphs of
            ``torch.compile(mode="reduce-overhead")`` are split around them.
    """
    operator = _define(name, schema, compute, fake, ordered, recorded)
    numbers = _numbers(schema)
    if not numbers:
        return operator

    _floats[name] = numbers
    schema = re.sub(r"\bfloat\b", "Tensor", schema)
    # Never recorded: a CUDA graph would replay the number that the tensor held when it was captured.
    of_tensors = _define(
        f"{name}{_OF_TENSORS}", schema, _of_numbers(compute, numbers), fake, ordered, recorded=False
    )

    def compiled(*args):
        if _vary(args, numbers):
            return of_tensors(*(_as_tensor(x) if k in numbers else x for k, x in enumerate(args)))
        return operator(*args)

    return compiled


def _define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    ordered: bool,
    recorded: bool,
) -> Callable[..., Any]:
    """One operator of :func:`define`."""
    apart = ordered or not recorded
    _library.define(f"{name}{schema}", tags=(torch.Tag.cudagraph_unsafe,) if apart else ())
    _library.impl(name, compute, "CompositeExplicitAutograd")

    def traced(*args):
        from torch._inductor import config  # loaded only when compiling

        # Inductor does not see the tag of an ordered operator.
        if f"tllib_rs::{name}" not in config.custom_should_partition_ops:
            config.custom_should_partition_ops = [*config.custom_should_partition_ops, f"tllib_rs::{name}"]
        return fake(*args)

    torch.library.register_fake(f"tllib_rs::{name}", traced if ordered else fake, lib=_library)
    if ordered:
        _library._register_effectful_op(f"tllib_rs::{name}", torch.library.EffectType.ORDERED)
    return getattr(torch.ops.tllib_rs, name).default


def _numbers(schema: str) -> list[int]:
    """The positions of the floats among the arguments."""
    arguments, _, _ = schema.partition(" -> ")
    return [k for k, argument in enumerate(arguments[1:].split(", ")) if argument.startswith("float")]


def _vary(args: Sequence[Any], numbers: Sequence[int]) -> bool:
    """Whether one of the numbers is a symbol made by the compiler, or a tensor made by :func:`_as_tensor`."""

    def varies(number):
        if isinstance(number, torch.Tensor):
            return True
        if number is None or not torch.compiler.is_compiling():
            return False
        return not torch.fx.experimental.symbolic_shapes.has_static_value(number)

    return any(varies(args[k]) for k in numbers)


def _as_tensor(number: float | torch.Tensor | None) -> torch.Tensor | None:
    """The number as a tensor, by a multiplication: torch recompiles most other operations for each value of a
    symbol."""
    if isinstance(number, torch.Tensor) and number.requires_grad:
        raise TypeError("a number must not be a tensor that requires a gradient: it is a constant here")
    if number is None or isinstance(number, torch.Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def _of_numbers(function: Callable[..., Any], numbers: Sequence[int]) -> Callable[..., Any]:
    """``function`` of floats, as a function of the tensors that :func:`_as_tensor` made of them."""

    def of_tensors(*args):
        return function(*(float(x) if k in numbers and x is not None else x for k, x in enumerate(args)))

    return of_tensors


def differentiate(
    name: str,
    backward: Backward,
    setup_context: SetUp,
    composed: Callable[..., Any] | None,
    differentiable: int | None = None,
) -> None:
    """Give derivatives to the operator ``tllib_rs::name``, and to its variant that takes tensors for numbers:
    see :func:`tllib_rs._derivatives.differentiate`."""
    _derivatives.differentiate(_library, name, backward, setup_context, composed, differentiable)
    if name in _floats:
        composed = composed and _of_numbers(composed, _floats[name])
        name = f"{name}{_OF_TENSORS}"
        _derivatives.differentiate(_library, name, backward, setup_context, composed, differentiable)


def register(
    name: str,
    schema: str,
    call: Callable[..., Any],
    fake: Callable[..., tuple[torch.Tensor, ...]],
    differentiable: int = 1,
    extra: int = 0,
    widened: Literal["never", "on devices", "everywhere"] = "never",
) -> Callable[..., Any]:
    """Define the operator ``tllib_rs::name`` and return a function with the outputs of ``call``: that of
    :func:`or_transparent`.

    Args:
        name: of the loss.
        schema: the arguments, as in ``(Tensor logits, float temperature)``. The differentiable tensors
            come first.
        call: the extension's function: the loss, or a tuple that begins with it.
        fake: empty tensors like the outputs of ``call``, from fake inputs; always a tuple.
        differentiable: how many arguments the loss is differentiable with respect to.
        extra: how many tensors ``call`` returns after the loss.
        widened: where autocast makes a half-precision loss float32. Autocast is no longer active when the
            operator runs, so it has one more argument, which says whether it was.
    """
    count = differentiable

    def outputs_of(autocast, *args):
        # The extension itself checks whether autocast is active.
        with torch.autocast(args[0].device.type) if autocast else nullcontext():
            outputs = call(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def compute(*args):
        *args, autocast, wanted = args
        # The extension stores gradients only for tensors that require them: call it with leaves.
        with _recorded():
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            for x, want in zip(args, wanted, strict=False):
                x.requires_grad_(want)
            loss, *rest = outputs_of(autocast, *args)
            grads = _gradients(loss, args[:count])
        return (loss.detach(), *grads, *rest)

    def stored(args, wanted):
        return [
            x.new_empty(x.shape if want else (0,), dtype=_kept(x))
            for x, want in zip(args, wanted, strict=False)
        ]

    def composed(*args):
        *args, autocast, wanted = args
        loss, *rest = outputs_of(autocast, *args)
        return (loss, *stored(args, wanted), *rest)

    def fake_compute(*args):
        *args, autocast, wanted = args
        loss, *rest = fake(*args)
        if autocast:
            loss = loss.new_empty(loss.shape, dtype=at_least_float32(loss.dtype))
        return (loss, *stored(args, wanted), *rest)

    def setup_context(ctx, inputs, output):
        ctx.dtypes = [x.dtype if want else None for x, want in zip(inputs, inputs[-1], strict=False)]
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        return output[1 : 1 + count]

    def backward(ctx, grads, incoming, *_):
        def scaled(grad, dtype):
            if dtype is None:
                return None
            # The incoming gradient of an unreduced loss, one per row, broadcasts along dimension 1.
            each = incoming.unsqueeze(1) if 0 < incoming.dim() < grad.dim() else incoming
            return (grad * each).to(dtype)

        return tuple(map(scaled, grads, ctx.dtypes)) + (None,) * (ctx.arguments - count)

    outputs = ", ".join(["Tensor"] * (1 + count + extra))
    operator = define(
        name, f"{schema[:-1]}, bool autocast, bool[] wanted) -> ({outputs})", compute, fake_compute
    )
    differentiate(name, backward, setup_context, composed, count)

    def region(device):
        nowhere = {"never": (device,), "on devices": ("cpu", "meta"), "everywhere": ("meta",)}[widened]
        return device not in nowhere and torch.is_autocast_enabled(device)

    def opaque(*args):
        loss, *rest = operator(*args, region(args[0].device.type), [False] * count)
        return (loss, *rest[count:]) if extra else loss

    results = ", ".join(["Tensor"] * (1 + extra))
    return or_transparent(opaque, name, f"{schema} -> ({results})", call)


def or_transparent(
    opaque: Callable[..., Any], name: str, schema: str, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the operator ``tllib_rs::name_composite``, which graphs decompose into the operations of
    ``call``. Return a function that uses it if there is no kernel for the device, and ``opaque`` otherwise.

    The composites treat sizes as constants, so graphs with dynamic shapes contain the opaque operator.
    """

    def composed(*args):
        *args, _ = args
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if any(isinstance(n, torch.SymInt) for x in tensors for n in x.shape):
            return opaque(*args)
        # Strides and offsets may still be symbols.
        return call(*map(of_fixed_sizes, args))

    _library.define(f"{name}_composite{schema.replace(')', ', str build)', 1)}")
    _library.impl(f"{name}_composite", composed, "CompositeImplicitAutograd")
    transparent = getattr(torch.ops.tllib_rs, f"{name}_composite").default

    numbers = _numbers(schema)

    def compiled(*args):
        if _has_kernels(args[0].device.type) or _vary(args, numbers):
            return opaque(*args)
        return transparent(*args, _BUILD)

    return compiled


def _has_kernels(device: str) -> bool:
    return _core.has_kernels(device)


# What torch.compiler.assume_constant_result does, but that imports the whole compiler: a second more for
# users who only import a loss.
_has_kernels._dynamo_marked_constant = True


def _gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients with respect to the inputs, contiguous, in the dtype of :func:`_kept`; empty ones for
    those that require none."""
    leaves = [x for x in inputs if x.requires_grad]
    grads = _core.gradients(loss, len(inputs)) if leaves else [None] * len(inputs)
    if grads is None:
        # The loss is a composite. Backward in this thread: a graph being captured does not track memory that
        # another thread allocates.
        with torch.autograd.set_multithreading_enabled(False):
            found = iter(torch.autograd.grad(loss, leaves, torch.ones_like(loss)))
        grads = [next(found) if x.requires_grad else None for x in inputs]
    return [
        grad.to(_kept(x)).contiguous() if x.requires_grad else x.new_empty(0, dtype=_kept(x))
        for grad, x in zip(grads, inputs, strict=True)
    ]


def _kept(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a gradient with respect to ``x`` is stored until backward: in float16, many would
    underflow to 0 before the loss scale is applied."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@contextmanager
def _recorded() -> Iterator[None]:
    """Enable autograd for libtorch's operations, as outside of an operator: while an operator with its own
    gradient runs, torch excludes the autograd dispatch keys."""
    key, excluded = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with excluded(key.AutogradFunctionality, False), excluded(key.AutogradOther, False), torch.enable_grad():
        yield


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What a float32 tensor promotes ``dtype`` to."""
    return dtype if dtype == torch.float64 else torch.float32
