"""How many updates a teacher has seen, and its decay factor, carried by its saved state.

They are stored in the attribute ``_metadata`` that ``torch.nn.Module.state_dict`` gives its dictionary:
``torch.save`` keeps it, and code that does not know of it, such as tllib's teacher and ``strict`` loading,
ignores it. A state that was rebuilt from its keys and tensors alone has lost it, and one that was filled in
place, tensor by tensor, still carries the teacher's previous values.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor

from tllib_rs import _core

#: No module has this name: the other keys are dotted paths of identifiers.
KEY = "<tllib_rs.EMATeacher>"


def attach(state: dict[str, Any], step: int, alpha: float) -> dict[str, Any]:
    """``state``, carrying both."""
    metadata = getattr(state, "_metadata", None)
    if metadata is None:
        # A module that overrides `state_dict` may return a dictionary that takes no attributes.
        state = OrderedDict(state)
        metadata = state._metadata = OrderedDict()
    metadata[KEY] = {"step": step, "alpha": float(alpha)}
    return state


def find(state: dict[str, Any]) -> tuple[int, float] | None:
    """Step and alpha, where ``state`` carries them.

    Raises:
        TypeError, ValueError: it carries something else.
    """
    found = (getattr(state, "_metadata", None) or {}).get(KEY)
    if found is None:
        return None
    step, alpha = found["step"], found["alpha"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"EMATeacher: step in the state must be a count of updates, got {step!r}")
    _core.check_alpha(alpha)
    return step, alpha


def is_own(state: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the tensors of ``state`` are those of the module itself, whose state is ``own`` now."""
    addresses = {key: _address(value) for key, value in own.items()}
    # Empty tensors have no address.
    addresses = {key: address for key, address in addresses.items() if address}
    return bool(addresses) and all(_address(state.get(key)) == address for key, address in addresses.items())


def _address(value: Any) -> int:
    """The address of the values that this rank holds."""
    if not isinstance(value, Tensor):
        return 0
    return (value.to_local() if hasattr(value, "to_local") else value).data_ptr()
