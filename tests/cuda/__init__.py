"""The CUDA kernels on a machine without a device: compiled for the CPU, and run by the same launches."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from tests.threads import processors

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "cuda"
ELEMENTS = ("f32", "f16", "bf16")


def compiler() -> str:
    """The C++ compiler that the extension, too, is built with."""
    return os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "g++").split()[0]


@cache
def bounds_watch() -> dict[str, str]:
    """The environment variables with which races.cpp knows where each allocation ends: those of the address
    sanitizer. Empty if the compiler brings no such library, or one from before 2024 that some of the addresses at
    random collide with (google/sanitizers#1614)."""

    def library(name: str) -> str:
        command = [compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # The sanitizer looks up the functions for C++ exceptions before torch loads libstdc++.
    preloaded = [library("libasan.so"), library("libstdc++.so")]
    if not all(Path(path).is_absolute() for path in preloaded):
        return {}
    watch = {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}

    def starts() -> bool:
        try:
            # Those that do not end report the same error all the time.
            return not subprocess.call(
                ["true"], env=os.environ | watch, stderr=subprocess.DEVNULL, timeout=10
            )
        except subprocess.TimeoutExpired:
            return False

    # One process of four does not, where they collide.
    return watch if all(starts() for _ in range(30)) else {}


def build_emulator(folder: Path, sources: Path = SOURCES) -> Path:
    """Compiles every source for every element type into one library in ``folder``; returns its path.

    The library ends the process at a race or an index out of bounds, and with `bounds_watch` at an access to
    memory that is not allocated."""
    units = [(HERE / f"{name}.cpp", folder / f"{name}.o", []) for name in ("on_cpu", "races")]
    for source in sorted(sources.glob("*.cu")):
        for element in ELEMENTS:
            unit = folder / f"{source.stem}-{element}.cpp"
            # Each in a namespace of its own: the same names mean other element types.
            unit.write_text(f'#include "on_cpu.h"\nnamespace {{\n#include "{source}"\n}}\n')
            defines = [f"-DELEMENT={element}", f"-DSTEM={source.stem}"]
            # Reports each access to races.cpp, and checks array indices.
            watch = ["-fsanitize=thread", "-fsanitize=bounds-strict", "-fno-sanitize-recover=bounds-strict"]
            units.append((unit, unit.with_suffix(".o"), [*defines, *watch]))
    # -O1 and no contraction: what is tested is the source, not the host compiler.
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",  # it treats a jump to another stack as an error
        "-Wno-unknown-pragmas",
        f"-I{HERE}",
        f"-I{SOURCES}",
    ]

    def compile_one(unit: tuple[Path, Path, list[str]]) -> None:
        source, target, defines = unit
        subprocess.run([compiler(), *flags, *defines, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(min(8, processors())) as pool:
        list(pool.map(compile_one, units))
    library = folder / "libemulated.so"
    subprocess.run([compiler(), "-shared", *(str(unit[1]) for unit in units), "-o", str(library)], check=True)
    return library
