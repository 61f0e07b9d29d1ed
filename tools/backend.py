"""The build backend: maturin, with torch-sys pointed at the torch of the building interpreter.

torch-sys asks whatever ``python3`` comes first on the path for torch. Under pip's build isolation, or
when ``pip`` is called by its path, that may be another interpreter than the one that builds. A wrapper
in front of the path makes it the right one; nothing has to be set by the user.
"""

import contextlib
import os
import pathlib
import sys
import tempfile

import maturin

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable


@contextlib.contextmanager
def _this_interpreter_first():
    saved = {name: os.environ.get(name) for name in ("PATH", "LIBTORCH_USE_PYTORCH")}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("python", "python3"):
            wrapper = pathlib.Path(folder, name)
            wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            wrapper.chmod(0o755)
        os.environ["PATH"] = folder + os.pathsep + os.environ.get("PATH", os.defpath)
        os.environ["LIBTORCH_USE_PYTORCH"] = "1"
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with _this_interpreter_first():
        return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with _this_interpreter_first():
        return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return maturin.build_sdist(sdist_directory, config_settings)
