"""Check what a wheel's extension links: libtorch by name only, no CUDA, no absolute path.

python tools/check_wheel.py dist/tllib_rs-*.whl
"""

import io
import struct
import sys
import zipfile

# What every install of torch, CPU or CUDA, brings or every Linux has.
ALLOWED = {
    "libtorch_python.so", "libtorch_cpu.so", "libtorch.so", "libc10.so",
    "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip
NEEDED, STRTAB, RPATH, RUNPATH = 1, 5, 15, 29
PT_LOAD, PT_DYNAMIC = 1, 2


def dynamic_entries(elf: bytes) -> list[tuple[int, str]]:
    """(tag, string) of the entries of a 64-bit little-endian ELF file that name libraries or paths."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit("not a 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    headers = [struct.unpack_from("<IIQQQQ", elf, offset + k * size) for k in range(count)]
    loads = [(vaddr, start, length) for kind, _, start, vaddr, _, length in headers if kind == PT_LOAD]
    ((dynamic, length),) = [(h[2], h[5]) for h in headers if h[0] == PT_DYNAMIC]
    entries = list(struct.iter_unpack("<qQ", elf[dynamic : dynamic + length]))
    address = dict(entries)[STRTAB]
    ((vaddr, start, _),) = [s for s in loads if s[0] <= address < s[0] + s[2]]
    strings = io.BytesIO(elf[start + address - vaddr :]).getvalue()
    return [
        (tag, strings[value : strings.index(b"\0", value)].decode())
        for tag, value in entries
        if tag in (NEEDED, RPATH, RUNPATH)
    ]


def problems(path: str) -> list[str]:
    """What is wrong with the wheel."""
    with zipfile.ZipFile(path) as wheel:
        extensions = [n for n in wheel.namelist() if ".so" in n]
        if len(extensions) != 1 or not extensions[0].endswith("_core.abi3.so"):
            return [f"expected one abi3 extension, found {extensions}"]
        entries = dynamic_entries(wheel.read(extensions[0]))
    print(path, *sorted(value for _, value in entries), sep="\n  ")
    found = [f"{extensions[0]} has a run path: {v}" for tag, v in entries if tag != NEEDED]
    return found + [f"{extensions[0]} links {v}" for tag, v in entries if tag == NEEDED and v not in ALLOWED]


if __name__ == "__main__":
    failures = [p for path in sys.argv[1:] for p in problems(path)]
    print("\n".join(failures) or "links libtorch by name only, no CUDA library, no path")
    sys.exit(bool(failures) or len(sys.argv) < 2)
