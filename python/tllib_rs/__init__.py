"""The self-training methods of the Transfer Learning Library, fused in Rust, as drop-in classes.

The module tree mirrors tllib's: change ``from tllib.self_training.mcc import ...`` to
``from tllib_rs.self_training.mcc import ...``, or call :func:`patch_tllib`, or start the script by
``python -m tllib_rs.run script.py``.
"""

from tllib_rs._version import BUILT_FOR_TORCH, __version__, check_torch
from tllib_rs.patch import patch_tllib

check_torch()

__all__ = ["BUILT_FOR_TORCH", "__version__", "patch_tllib"]
