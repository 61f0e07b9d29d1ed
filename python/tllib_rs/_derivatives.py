"""Derivatives of the opaque operators of :mod:`tllib_rs._library`.

An operator has a backward pass of its own, which torch can neither differentiate again nor turn into a
forward-mode derivative: both would silently be 0. If one is requested, and inside transforms of
``torch.func``, the operator is replaced by what it is *composed* of, in operations that torch can
differentiate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

#: From the context, what :data:`SetUp` saved and the incoming gradients: one gradient for each input.
Backward = Callable[..., tuple[torch.Tensor | None, ...]]
#: From the context, the inputs and the outputs: what the backward pass needs.
SetUp = Callable[..., Sequence[torch.Tensor]]


def differentiate(
    library: torch.library.Library,
    name: str,
    backward: Backward,
    setup_context: SetUp,
    composed: Callable[..., Any] | None,
    differentiable: int | None,
) -> None:
    """Give the operator ``name`` a gradient.

    ``composed`` has the operator's arguments and outputs; outputs without a gradient may hold anything.
    ``None`` for an operator whose inputs cannot be kept: other derivatives than the gradient raise.

    If ``differentiable`` is a number, the operator's last argument is a ``bool[]`` that says which of so many
    first arguments want a gradient. Callers pass ``False``, and what is wanted is added here, where autograd
    is known: a caller that is exported knows nothing of the calls to come, and the graphs that the compiler
    has split into forward and backward run without autograd, with what was added when they were traced.
    """

    def composed_of(*args):
        return composed(*map(of_fixed_sizes, args))

    def keep(ctx, inputs, output):
        kept = setup_context(ctx, inputs, output)
        if composed is not None:
            # Not saved for backward: the gradient does not need them, and they may be written to before it.
            ctx.inputs, ctx.versions = inputs, [_version(x) for x in inputs]
        ctx.save_for_backward(*kept)

    def backward_or_again(ctx, *incoming):
        kept = ctx.saved_tensors  # raises in a second pass, of either kind
        try:
            return derivative(ctx, kept, incoming)
        finally:
            if composed is not None and not torch._C._autograd._get_current_graph_task_keep_graph():
                # torch gives up what is saved for backward alone.
                ctx.inputs = None

    def derivative(ctx, kept, incoming):
        if not torch.is_grad_enabled():
            return backward(ctx, kept, *incoming)
        if composed is None:
            raise _only_gradient(name)
        if [_version(x) for x in ctx.inputs] != ctx.versions:
            raise RuntimeError(
                f"tllib_rs::{name}: an input needed for a second derivative has been modified by an inplace "
                "operation"
            )
        # One input may be another or depend on it: the derivative must be with respect to this one alone.
        inputs = [
            x.view_as(x) if need else x for x, need in zip(ctx.inputs, ctx.needs_input_grad, strict=True)
        ]
        return _again(composed_of(*inputs), inputs, incoming, ctx.needs_input_grad)

    operator = getattr(torch.ops.tllib_rs, name).default
    standard = make_autograd_impl(operator, Info(backward_or_again, keep))

    def kernel(keys, *args):
        if differentiable is not None:
            grad = torch.is_grad_enabled()
            wanted = [
                want or (grad and x.requires_grad)
                for x, want in zip(args[:differentiable], args[-1], strict=True)
            ]
            args = (*args[:-1], wanted)
        if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
            return standard(keys, *args)
        if composed is None:
            raise _only_gradient(name)
        return composed_of(*args)

    library.impl(name, kernel, "Autograd", with_keyset=True)
    if composed is not None:
        library.impl(name, composed_of, "FuncTorchBatched")


def of_fixed_sizes(x: Any) -> Any:
    """A tensor whose sizes, strides or offset are symbols as one without, which composites need. The graph is
    recompiled for other sizes; the compiler elides the copy."""
    if not isinstance(x, torch.Tensor) or not x._has_symbolic_sizes_strides:
        return x
    return x.clone(memory_format=torch.contiguous_format).view([int(n) for n in x.shape])


def _version(x: Any) -> int | None:
    """How often a tensor has been written to, as far as torch knows."""
    return x._version if isinstance(x, torch.Tensor) and not x.is_inference() else None


def _only_gradient(name: str) -> RuntimeError:
    return RuntimeError(
        f"tllib_rs::{name}: this operator has a gradient and no other derivative: no create_graph, no "
        "forward mode and no transform of torch.func"
    )


def _again(
    outputs: Any, inputs: Sequence[Any], incoming: Sequence[torch.Tensor | None], needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of ``outputs``, with graphs of their own."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, incoming, strict=True)
        if grad is not None and output.requires_grad
    ]
    wanted = [k for k, need in enumerate(needed) if need]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [inputs[k] for k in wanted],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    grads: list[torch.Tensor | None] = [None] * len(inputs)
    for k, grad in zip(wanted, found, strict=True):
        grads[k] = grad
    return tuple(grads)
