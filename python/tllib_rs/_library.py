"""The losses as operators of torch, for ``torch.compile``.

Eager calls go straight to the extension. Under ``torch.compile`` a call into an extension would break
the graph, so each method registers the same function here as an opaque operator with a fake
implementation (shapes and dtypes only). :func:`register` is for losses, whose backward scales the stored
gradients, as the eager autograd node does; :func:`define` for everything else.

Where no kernel serves, the loss is transparent (:func:`or_transparent`): the compiler sees its composite in
torch's operations, and fuses them with each other and with what is around.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

from tllib_rs import __version__, _core

_library = torch.library.Library("tllib_rs", "DEF")
_file = os.stat(_core.__file__)
#: torch keeps compiled graphs on the disk, by the operators in them. What a transparent one is composed of is
#: no part of that, so this is: another for each version and build.
_BUILD = f"{__version__}-{_file.st_size:x}-{_file.st_mtime_ns:x}"


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    ordered: bool = False,
    recorded: bool = True,
) -> Callable[..., Any]:
    """Define the opaque operator ``tllib_rs::name``, without a gradient, and return it.

    Args:
        name: begins with the method's stem.
        schema: arguments and outputs, as in ``(Tensor h_k, Tensor(a!) queue_list) -> ()``.
        compute: what it does to real tensors.
        fake: empty tensors like the outputs of ``compute``, from fake inputs.
        ordered: for operators on state that is no argument: such calls stay, in the order of the program, and
            are never recorded.
        recorded: False for operators that keep memory between calls: the CUDA graphs of
            ``torch.compile(mode="reduce-overhead")`` end before them, and go on behind.
    """
    apart = ordered or not recorded
    _library.define(f"{name}{schema}", tags=(torch.Tag.cudagraph_unsafe,) if apart else ())
    _library.impl(name, compute, "CompositeExplicitAutograd")

    def traced(*args):
        from torch._inductor import config  # loaded only by who compiles

        # Inductor does not see the tag of an operator that is ordered.
        if f"tllib_rs::{name}" not in config.custom_should_partition_ops:
            config.custom_should_partition_ops = [*config.custom_should_partition_ops, f"tllib_rs::{name}"]
        return fake(*args)

    torch.library.register_fake(f"tllib_rs::{name}", traced if ordered else fake, lib=_library)
    if ordered:
        _library._register_effectful_op(f"tllib_rs::{name}", torch.library.EffectType.ORDERED)
    return getattr(torch.ops.tllib_rs, name).default


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give the operator ``tllib_rs::name`` a gradient."""
    torch.library.register_autograd(f"tllib_rs::{name}", backward, setup_context=setup_context, lib=_library)


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
        name: the method's stem.
        schema: the arguments, as in ``(Tensor logits, float temperature)``. The differentiable tensors
            come first.
        call: the extension's function: the loss, or a tuple that begins with it.
        fake: empty tensors like the outputs of ``call``, from fake inputs; always a tuple.
        differentiable: how many arguments the loss is differentiable with respect to.
        extra: how many tensors ``call`` returns after the loss.
        widened: where an autocast region makes a half-precision loss float32. By the time that the operator
            runs the region is over, so it has one more argument, which says whether there was one.
    """
    count = differentiable

    def compute(*args):
        # The extension looks for a region of its own accord.
        with torch.autocast(args[0].device.type) if args[-1] else nullcontext():
            return compute_here(*args[:-1])

    def compute_here(*args):
        # The extension stores gradients only for tensors that require them: ask it with leaves.
        with _recorded():
            leaves = [x.detach().requires_grad_() for x in args[:count]]
            others = [x.detach() if isinstance(x, torch.Tensor) else x for x in args[count:]]
            outputs = call(*leaves, *others)
            loss, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = _gradients(loss, leaves) if leaves else ()
        return (loss.detach(), *grads, *rest)

    def fake_compute(*args):
        loss, *rest = fake(*args[:-1])
        if args[-1]:
            loss = loss.new_empty(loss.shape, dtype=at_least_float32(loss.dtype))
        return (
            loss,
            *(x.new_empty(x.shape, dtype=_kept(x)) for x in args[:count]),
            *rest,
        )

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output[1 : 1 + count])
        ctx.dtypes = [x.dtype for x in inputs[:count]]
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx, incoming, *_):
        def scaled(grad, dtype):
            # A loss for each row scales what is along dimension 1.
            each = incoming.unsqueeze(1) if 0 < incoming.dim() < grad.dim() else incoming
            return (grad * each).to(dtype)

        return tuple(map(scaled, ctx.saved_tensors, ctx.dtypes)) + (None,) * (ctx.arguments - count)

    outputs = ", ".join(["Tensor"] * (1 + count + extra))
    operator = define(name, f"{schema[:-1]}, bool autocast) -> ({outputs})", compute, fake_compute)
    differentiate(name, backward, setup_context)

    def region(device):
        nowhere = {"never": (device,), "on devices": ("cpu", "meta"), "everywhere": ("meta",)}[widened]
        return device not in nowhere and torch.is_autocast_enabled(device)

    def opaque(*args):
        loss, *rest = operator(*args, region(args[0].device.type))
        return (loss, *rest[count:]) if extra else loss

    results = ", ".join(["Tensor"] * (1 + extra))
    return or_transparent(opaque, name, f"{schema} -> ({results})", call)


def or_transparent(
    opaque: Callable[..., Any], name: str, schema: str, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the operator ``tllib_rs::name_composite``, in whose place a graph has what ``call`` is composed
    of. Return a function that takes it where no kernel serves, and ``opaque`` elsewhere.

    The composites take sizes for numbers, so that graphs of any size have the opaque operator.
    """

    def composed(*args):
        *args, _ = args
        for place, x in enumerate(args):
            if not isinstance(x, torch.Tensor) or not x._has_symbolic_sizes_strides:
                continue
            if any(isinstance(n, torch.SymInt) for n in x.shape):
                return opaque(*args)
            # Only strides and offset are symbols: those of a copy, which the compiler leaves out, are not.
            args[place] = x.clone(memory_format=torch.contiguous_format)
        return call(*args)

    _library.define(f"{name}_composite{schema.replace(')', ', str build)', 1)}")
    _library.impl(f"{name}_composite", composed, "CompositeImplicitAutograd")
    transparent = getattr(torch.ops.tllib_rs, f"{name}_composite").default

    def compiled(*args):
        return opaque(*args) if _has_kernels(args[0].device.type) else transparent(*args, _BUILD)

    return compiled


def _has_kernels(device: str) -> bool:
    return _core.has_kernels(device)


# What torch.compiler.assume_constant_result does, which imports the whole compiler: a second more for who
# only imports a loss.
_has_kernels._dynamo_marked_constant = True


def _gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients with respect to the leaves, contiguous, as :func:`_kept` says."""
    grads = _core.gradients(loss, len(leaves))
    if grads is None:
        # Of a composite. In this thread: in another, a graph that is captured knows nothing of their memory.
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    return [grad.to(_kept(leaf)).contiguous() for grad, leaf in zip(grads, leaves, strict=True)]


def _kept(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a gradient with respect to ``x`` waits for the incoming one: many would be 0 in
    float16 before a loss scale reaches them."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@contextmanager
def _recorded() -> Iterator[None]:
    """As outside of any operator: what libtorch computes has a gradient. Where an operator has one of its
    own, torch leaves out all others while it runs."""
    key, excluded = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with excluded(key.AutogradFunctionality, False), excluded(key.AutogradOther, False), torch.enable_grad():
        yield


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What a float32 tensor promotes ``dtype`` to."""
    return dtype if dtype == torch.float64 else torch.float32
