"""Runs tests of ours once more, in a separate process."""

import os
import subprocess
import sys
from pathlib import Path


def passes_again(files, which, environment):
    """Fails unless the tests of ``files`` that ``which`` selects (pytest's ``-k``) pass with these variables
    added to the environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{file}" for file in files), "-k", which]
    root, variables = Path(__file__).parents[1], os.environ | environment
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
