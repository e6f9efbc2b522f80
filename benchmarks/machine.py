"""The machine under test: what it is called, and how fast it copies and multiplies at most."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path
from typing import Any

import torch

from dwm_fast.ops.measured import slug as slug

from .measure import Budget, Case, Run, Way

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_PRODUCT = {"cpu": (1536, torch.float32), "cuda": (8192, torch.bfloat16)}


def cpu_name() -> str:
    """The processor's name, as short as it is known here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = found.group(1) if found else platform.processor() or platform.machine() or "CPU"
    return " ".join(name.replace("(R)", "").replace("(TM)", "").split())


def device_name(device: torch.device) -> str:
    """Name of the device in result rows; for a CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def facts(device: torch.device) -> dict[str, Any]:
    """Columns that every row of one run shares."""
    try:
        import triton

        version = str(triton.__version__)
    except ImportError:
        version = "-"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def copy_way(moved: int, device: torch.device, name: str = "memory copy") -> Way:
    """A copy that reads and writes `moved` bytes in all: the limit of whatever only moves data."""

    def make() -> Run:
        source = torch.randint(0, 1 << 30, (max(1, moved // 8),), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Way(name, make, moved=moved // 8 * 8, graph=True)


def ceiling_case(device: torch.device) -> Case:
    """The two ceilings of a device: a large copy and a large matrix product."""
    size, dtype = _PRODUCT[device.type]

    def make() -> Run:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    product = Way("matrix product", make, flops=2 * size**3, graph=True)
    parameters: dict[str, Any] = {"copied": _COPY_BYTES[device.type], "n": size, "dtype": str(dtype)[6:]}
    return Case("ceiling", parameters, [copy_way(2 * _COPY_BYTES[device.type], device), product], lambda: None)


CEILING_BUDGET = Budget(seconds=3.0, min_rounds=5, max_rounds=30)
