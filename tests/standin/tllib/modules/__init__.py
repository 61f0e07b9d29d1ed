from .classifier import *
from .entropy import *
from .grl import *

__all__ = ["classifier", "entropy", "grl"]
