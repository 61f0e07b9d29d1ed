"""The version of this package, and the one torch release that it is compiled against."""

from importlib import metadata

try:
    __version__ = metadata.version("tllib_rs")
except metadata.PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+source"

BUILT_FOR_TORCH = "2.11"


def check_torch(installed: str | None = None) -> None:
    """Raise ImportError unless the installed torch is the one that the extension was built for.

    Must run before the extension is loaded: under another torch its symbols would not resolve.
    """
    if installed is None:
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                f"tllib_rs {__version__} needs torch {BUILT_FOR_TORCH}, and no torch is installed: "
                f"run `pip install 'torch=={BUILT_FOR_TORCH}.*'`."
            ) from error
        installed = torch.__version__
    if ".".join(installed.split(".")[:2]) != BUILT_FOR_TORCH:
        raise ImportError(
            f"tllib_rs {__version__} was built for torch {BUILT_FOR_TORCH}, but torch {installed} is "
            f"installed: run `pip install 'torch=={BUILT_FOR_TORCH}.*'`."
        )
