"""Run a script with our classes inside tllib: ``python -m tllib_rs.run script.py ARGS...``.

Also ``-m module``, and a folder or zip file with a ``__main__``, as ``python`` itself takes them.
"""

import builtins
import importlib.machinery
import multiprocessing.spawn
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType

from tllib_rs.patch import patch_tllib

_USAGE = "usage: python -m tllib_rs.run (script.py | -m module) [arguments of the script]"


def main() -> None:
    """Run what the command line names, as ``__main__``."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    if not arguments or arguments == ["-m"]:
        print(_USAGE, file=sys.stderr)
        sys.exit(2)
    patch_tllib()
    _patch_children()
    module = sys.modules["__main__"] = ModuleType("__main__")
    vars(module).update(__annotations__={}, __builtins__=builtins)
    if arguments[0] == "-m":
        # What `python -m` calls: the same search, the same errors, the same frames in a traceback.
        sys.argv = ["-m", *arguments[2:]]
        _call(runpy._run_module_as_main, arguments[1])  # type: ignore[attr-defined]
        return
    sys.argv = arguments
    path = os.path.abspath(arguments[0])
    if pkgutil.get_importer(path) is not None:  # a folder or zip file
        _set_path(path)
        _call(runpy._run_module_as_main, "__main__", False)  # type: ignore[attr-defined]
    else:
        _set_path(os.path.dirname(os.path.realpath(path)))
        _call(_run_file, path, module)


def _set_path(folder: str) -> None:
    """Replace the working directory, which ``python -m`` put first in ``sys.path``, by ``folder``."""
    if sys.flags.isolated or getattr(sys.flags, "safe_path", False):
        return  # nothing was put there
    sys.path[0] = folder


def _patch_children() -> None:
    """Patch spawned processes too, before they import the script."""
    prepare = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, object]:
        return {**prepare(name), "tllib_rs": _PatchWhenLoaded()}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


class _PatchWhenLoaded:
    """The new process reads its preparation data before anything else, and reading this patches."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return patch_tllib, ()


def _run_file(path: str, module: ModuleType) -> None:
    vars(module).update(
        __file__=path,
        __cached__=None,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
    )
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        message = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
        print(f"{sys.orig_argv[0]}: {message}", file=sys.stderr)
        sys.exit(2)
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))


def _call(run: Callable[..., object], *arguments: object) -> None:
    """Call ``run``. An uncaught error exits as in Python, but its traceback is shown without our frames."""
    try:
        run(*arguments)
    except SystemExit:
        raise
    except BaseException as error:
        trace, hook = _without_our_frames(error.__traceback__), sys.excepthook

        def show(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
            sys.excepthook, sys.last_traceback = hook, trace
            hook(kind, value.with_traceback(trace), trace)

        sys.excepthook = show
        raise


def _without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
