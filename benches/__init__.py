"""How fast the methods are: ``python -m benches``.

A method has one file here, ``benches/<stem>.py``, which holds ``METHOD``: its cases (a setting such as a
shape) and the verdicts that need more than one case. A case sets up *providers*, implementations of the
same step from the same inputs:

======== =====================================================================================
ours     ``tllib_rs``
plain    the formulation of ``tests/plain/<stem>.py``
compiled the same under ``torch.compile``, at some settings
limit    what no implementation is expected to beat: it computes less, so its results differ
tllib    the original, where one is installed or ``TLLIB_DIR`` names a checkout
======== =====================================================================================

and others by name: packages of the extra ``bench``, and other formulas. Before anything is timed, the results
of all providers but the limit are compared. Timing goes round robin through the providers, in blocks, so that
whatever else the machine does hits all of them alike; what counts is the ratio of blocks of the same round.

Modules whose name begins with an underscore are the harness.
"""

import os

# The profiler (:mod:`benches._memory`) otherwise warns of devices that are not there, and of tensors older
# than itself. Read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
