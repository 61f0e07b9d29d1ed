"""Checkpoints that a run can be stopped and continued from, at any moment and to the last bit.

:func:`save` never leaves half a file, whenever the process dies; :func:`random_states` holds what the random
numbers of torch, numpy and Python go on from. Everything loads with ``weights_only=True``.
"""

import os
import pathlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["load", "random_states", "save", "set_random_states"]


def save(state: Any, path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path`` so that the file is, at every moment, the old one or the new one, whole.

    The bytes go to ``<path>.part`` beside it, reach the disk, and take the name in one step. After a kill a
    ``.part`` may be left over; the next save overwrites it. A path has one writer: with several processes
    let one of them save, or give each its own path.

    Args:
        state: what :func:`torch.save` takes. What is made of tensors, numbers, strings, lists and dicts (any
            ``state_dict``) loads again with ``weights_only=True``.
        path: the file; folders that are missing are made.

    Examples::

        >>> save({"model": model.state_dict(), "random": random_states()}, "run/last.pt")
    """
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            # Without this the new name can reach the disk before the bytes do.
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """What :func:`save` wrote, by ``torch.load(..., weights_only=True)``: loading runs no code of the file's.

    Raises:
        FileNotFoundError: nothing was saved yet.
        pickle.UnpicklingError: the file holds objects of other types.
    """
    return torch.load(path, map_location=map_location, weights_only=True)


def random_states() -> dict[str, Any]:
    """The states of the global random numbers of torch (CPU and, once used, CUDA), numpy and Python.

    Generators of your own (``torch.Generator``, ``numpy.random.default_rng``) have a state of their own:
    save ``generator.get_state()``, ``rng.bit_generator.state``.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the one whose state is global)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        # weights_only takes tensors and no arrays.
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    # Asking would start CUDA, and cost memory on every device, for a run that does not use it.
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on from what :func:`random_states` returned. Do it last: making networks and loaders draws numbers.

    Raises:
        KeyError: ``states`` has another form.
        RuntimeError: more CUDA devices than there are here.
    """
    name, keys, *rest = states["numpy"]
    version, internal, gauss = states["python"]
    torch.set_rng_state(states["torch"].cpu())
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the new name last through a loss of power, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
