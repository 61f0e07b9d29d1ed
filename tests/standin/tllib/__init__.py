"""Stands in for tllib in tests."""

from . import alignment, modules, self_training, utils, vision

__version__ = "0.4"

__all__ = ["alignment", "modules", "self_training", "utils", "vision"]
