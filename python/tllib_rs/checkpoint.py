"""Checkpoints from which a run resumes bit for bit, whenever it was stopped.

:func:`save` is atomic even if the process dies; :func:`random_states` holds the RNG states of torch, numpy
and Python. Everything loads with ``weights_only=True``.
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
    """Write ``state`` to ``path`` atomically: at every moment the file is the complete old or new one.

    The bytes are written to ``<path>.part``, synced to disk, and renamed. If the process is killed, a
    ``.part`` may be left over; the next save overwrites it. A path must have one writer: with several
    processes let one of them save, or give each its own path.

    Args:
        state: anything :func:`torch.save` takes. Tensors, numbers, strings, lists and dicts (any
            ``state_dict``) load again with ``weights_only=True``.
        path: the file; missing folders are created.

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
    """Load what :func:`save` wrote, by ``torch.load(..., weights_only=True)``: no code in the file is run.

    Raises:
        FileNotFoundError: nothing was saved yet.
        pickle.UnpicklingError: the file holds objects of other types.
    """
    return torch.load(path, map_location=map_location, weights_only=True)


def random_states() -> dict[str, Any]:
    """The states of the global RNGs of torch (CPU and, once used, CUDA), numpy and Python.

    Your own generators (``torch.Generator``, ``numpy.random.default_rng``) have their own state:
    save ``generator.get_state()``, ``rng.bit_generator.state``.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the one whose state is global)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        # weights_only takes tensors and no arrays.
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    # The call would initialize CUDA, and take memory on every device, for a run that does not use it.
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what :func:`random_states` returned. Call it last: creating networks and loaders draws numbers.

    Raises:
        KeyError: ``states`` has another form.
        RuntimeError: ``states`` has more CUDA devices than this machine.
    """
    name, keys, *rest = states["numpy"]
    version, internal, gauss = states["python"]
    torch.set_rng_state(states["torch"].cpu())
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _sync_folder(folder: pathlib.Path) -> None:
    """Make the rename survive a power loss, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
