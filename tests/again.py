"""Runs tests of ours once more, in separate processes, several at a time."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.threads import processors

#: A run takes one processor for most of its time, and up to 2 GB.
AT_ONCE = min(4, processors())


def begun(request, run):
    """For a fixture to yield: the futures of ``run(stem)``, for each ``stem`` of the selected tests that use the
    fixture."""
    items = [item for item in request.session.items if request.fixturename in item.fixturenames]
    stems = dict.fromkeys(item.callspec.params["stem"] for item in items if item.path == request.path)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {stem: pool.submit(run, stem) for stem in stems}
        pool.shutdown(cancel_futures=True)


def passes_again(files, which, environment):
    """Fails unless the tests of ``files`` that ``which`` selects (pytest's ``-k``) pass with these variables
    added to the environment."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", which]
    command = [sys.executable, "-m", "pytest", *(f"tests/{file}" for file in files), *options]
    # Threads that wait for each other leave the processor to other runs.
    variables = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
