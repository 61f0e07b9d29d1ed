"""What a bug report needs: ``python -m tllib_rs.info``."""

import os
import platform
import sys

import numpy
import torch

from tllib_rs import __version__, _core


def report() -> dict[str, str]:
    """Versions, build flags, instruction sets, threads and devices, by name."""
    build = _core.build_info()
    devices = ["cpu"] + [
        f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    return {
        "tllib_rs": __version__,
        "extension": f"{build['version']}, {build['profile']}, {build['target']}, {build['rustc']}",
        "built for torch": build["torch"],
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "numpy": numpy.__version__,
        "python": sys.version.replace("\n", " "),
        "platform": platform.platform(),
        "instruction set": f"{build['isa']} (torch: {torch.backends.cpu.get_cpu_capability()})",
        "matrix products": build["products"],
        "TLLIB_RS_ISA": os.environ.get("TLLIB_RS_ISA", "not set"),
        "TLLIB_RS_CUDA": os.environ.get("TLLIB_RS_CUDA", "not set"),
        "TLLIB_RS_COMPOSITE": os.environ.get("TLLIB_RS_COMPOSITE", "not set"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "devices": ", ".join(devices),
    }


def main() -> None:
    """Print the report."""
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
