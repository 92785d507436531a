"""What a run was made with: versions, and the machine without its name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obclip_core.provenance import ROOT, digest

COMPUTE = ("torch", "numpy", "scipy", "diffusers", "transformers", "torchmetrics")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute, as installed, and the hash of all pins."""
    pins = digest(ROOT / "requirements.txt")
    return {"python": platform.python_version(), **{name: version(name) for name in COMPUTE}, "requirements": pins}


def machine() -> dict[str, Any]:
    """The system, the processor, its cores and the instruction set and threads that torch uses, memory, and the GPU."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": _processor(), "cores": os.cpu_count(),
            "memory_gb": _memory(), "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(), "gpu": gpu}


def _processor() -> str:
    """The processor's model; platform.processor() where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor()


def _memory() -> int | None:
    """Gigabytes; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    except (AttributeError, OSError, ValueError):
        return None
