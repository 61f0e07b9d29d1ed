"""The self-training methods of the Transfer Learning Library, fused in Rust, as drop-in classes.

The module tree mirrors tllib's: change ``from tllib.self_training.mcc import ...`` to
``from tllib_rs.self_training.mcc import ...``.
"""

from tllib_rs._version import BUILT_FOR_TORCH, __version__, check_torch

check_torch()

__all__ = ["BUILT_FOR_TORCH", "__version__"]
