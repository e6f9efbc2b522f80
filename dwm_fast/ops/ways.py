"""Which way computes a masked product: in one pass, or staged (mask the weight first, then the vendor's product).

The rule is deterministic and reads sizes alone, in this order:

1. a way that cannot compute these tensors is never taken;
2. `use_way` forces the other;
3. the nearest shape of a table measured on this device (`dwm_fast._bench.tune`), if one lies within a factor of
   two in each of M, N and K, decides by its times;
4. thresholds from theory: drawing or expanding bits is paid again for every tile of M, so one pass is taken only
   where one tile covers M.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dwm_fast._files import cache_folder
from dwm_fast.errors import BackendUnavailable, InputError

ONE_PASS, STAGED = "one-pass", "staged"
WAYS = (ONE_PASS, STAGED)
TABLE_FORMAT = "dwm-fast dispatch 1"

CPU_ROWS = 8
"""Rows up to which the C++ extension reads bits itself; beyond, unpacking once and the vendor's product win."""
LARGE_WEIGHT = 1 << 22
"""Weights (16 MiB in fp32) that no second-level cache holds: reading them is what a product of few rows costs."""
CPU_ROWS_LARGE = 16
"""The same limit for large weights, whose masked copy would have to be written to memory and read again."""
PACKED_ROWS = 64
"""One tile of M: bits are expanded once, and each weight is read once."""
DRAWN_ROWS = 16
"""A tile with logits, weights and four Philox words an element in registers holds no more rows without spilling."""
FMA_ROWS = 16
"""fp32 without TF32 has no matrix instruction: beyond, the vendor's tiles are better than ours."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_forced: str | None = None


@dataclass(frozen=True)
class Problem:
    """One masked product: M rows of N outputs, each a sum over K (input gradients: of K outputs over N).

    Attributes:
        op: the operation's name; gradients of the weight or the logits have names that end in "_grad".
        device: "cuda", "interpreter" (Triton's, on CPU tensors), or "cpu", where the C++ extension computes.
        name: of the GPU, "" where there is none.
        dtype: compute dtype; tf32: whether fp32 products may use TF32.
        taps: elements of a convolution's window, 1 for a linear map; groups: of a convolution.
    """

    op: str
    device: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    tf32: bool = False
    taps: int = 1
    groups: int = 1
    name: str = ""

    @property
    def packed(self) -> bool:
        """Whether the mask is read from bits."""
        return "_packed" in self.op


@dataclass(frozen=True)
class Choice:
    """The way taken and the reason, in words."""

    way: str
    why: str

    def __str__(self) -> str:
        return f"{self.way}: {self.why}"


def matmul_tf32() -> bool:
    """Whether torch's own setting gives fp32 matrix products to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def convolution_tf32() -> bool:
    """Whether torch's own setting gives fp32 convolutions to TF32."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def problem_on(
    op: str, device: torch.device, dtype: torch.dtype, weight: torch.dtype, m: int, n: int, k: int, tf32: bool,
    taps: int = 1, groups: int = 1,
) -> Problem:  # fmt: skip
    """The problem of a product in `dtype` over a weight of dtype `weight`, on a device where Triton computes."""
    where, name = ("cuda", _device_name(device)) if device.type == "cuda" else ("interpreter", "")
    return Problem(op, where, dtype if weight in _FLOATS else weight, m, n, k, tf32, taps, groups, name)


@contextlib.contextmanager
def use_way(way: str | None) -> Iterator[None]:
    """Force masked products inside the block to be computed in "one-pass" or "staged"; None: by the rule.

    It holds for the whole process, backward passes inside the block included. The backend `reference` has one way
    only and takes no notice. A product that cannot be computed in one pass raises BackendUnavailable when it is.

    Raises InputError for another name.
    """
    if way is not None and way not in WAYS:
        raise InputError(f"use_way got '{way}'; expected one of {', '.join(WAYS)}, or None")
    global _forced
    outer, _forced = _forced, way
    try:
        yield
    finally:
        _forced = outer


def choose(problem: Problem) -> Choice:
    """The way in which `problem` is computed, and why."""
    obstacle = _obstacle(problem)
    if _forced is not None:
        if _forced == ONE_PASS and obstacle:
            raise BackendUnavailable(f"use_way('{ONE_PASS}') was asked for and {problem.op} cannot: {obstacle}")
        return Choice(_forced, "use_way forces it")
    if obstacle:
        return Choice(STAGED, obstacle)
    row = nearest(problem)
    if row is not None:
        way = ONE_PASS if row["one_pass_us"] <= row["staged_us"] else STAGED
        return Choice(way, f"measured on {problem.name} at M={row['m']}, N={row['n']}, K={row['k']}: one pass "
                           f"{row['one_pass_us']:.1f} us, staged {row['staged_us']:.1f} us")  # fmt: skip
    return _by_theory(problem)


def one_pass(problem: Problem) -> bool:
    """Whether `problem` is computed in one pass."""
    return choose(problem).way == ONE_PASS


def _obstacle(problem: Problem) -> str:
    """Why one pass cannot compute this, or ""."""
    if problem.device == "cpu":
        if problem.op != "linear_packed":
            return "on a CPU only linear_packed has a one-pass kernel"
        return "" if problem.dtype == torch.float32 else f"the CPU's one-pass kernel takes float32, not {problem.dtype}"
    if problem.dtype not in _FLOATS:
        return f"one-pass kernels take float32, bfloat16 and float16, not {problem.dtype}"
    if problem.groups > 1 and problem.k == problem.taps:
        return "a depthwise convolution has one channel a group, too few for a tile"
    return ""


def _by_theory(problem: Problem) -> Choice:
    if problem.op.startswith("conv2d"):
        return Choice(STAGED, "convolutions run in one pass only where a table of this device says that it is faster")
    if problem.device == "cpu":
        limit = CPU_ROWS_LARGE if problem.n * problem.k >= LARGE_WEIGHT else CPU_ROWS
    elif problem.dtype == torch.float32 and not problem.tf32:
        limit = FMA_ROWS
    elif problem.packed or problem.op.endswith("mask_grad"):
        limit = PACKED_ROWS
    else:
        limit = DRAWN_ROWS
    if problem.m <= limit:
        return Choice(ONE_PASS, f"M={problem.m} is at most {limit}, so one tile covers it (no table of this device)")
    return Choice(STAGED, f"M={problem.m} is above {limit}, where masking once pays (no table of this device)")


# --- measured tables ---------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def table_paths(name: str) -> list[Path]:
    """Files that may hold the table of the device called `name`, the first that is there counts.

    The user's own measurement outranks the one that comes with the library, in a checkout or installed.
    """
    package = Path(__file__).parents[1]
    own = cache_folder()
    folders = [*([own] if own else []), package / "_bench" / "results", package.parent / "benchmarks" / "results"]
    return [folder / f"dispatch-{slug(name)}.json" for folder in folders]


@functools.cache
def table(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of the device's table, () where there is none; a file that cannot be read is one warning and no table."""
    for path in table_paths(name) if name else []:
        if path.is_file():
            try:
                return read_table(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"dwm_fast: {path} is not used: {error}", RuntimeWarning, stacklevel=2)
    return ()


def read_table(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a table file. ValueError where it is none: what is wrong."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != TABLE_FORMAT:
        raise ValueError(
            f"expected a table of the format '{TABLE_FORMAT}'; measure it with python -m dwm_fast._bench.tune"
        )
    rows = content.get("rows")
    numbers = ("m", "n", "k", "taps", "one_pass_us", "staged_us")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("'rows' is no list of rows")
    for i, row in enumerate(rows):
        bad = [f for f in numbers if not isinstance(row.get(f), (int, float)) or not row[f] > 0]
        bad += [f for f in ("op", "dtype") if not isinstance(row.get(f), str)]
        if bad:
            raise ValueError(f"row {i} lacks {', '.join(bad)}, or they are not above 0")
    return tuple(rows)


@functools.lru_cache(maxsize=4096)
def nearest(problem: Problem) -> dict[str, Any] | None:
    """The measured row nearest to `problem` in the logarithms of M, N and K, within a factor of two in each."""
    best: dict[str, Any] | None = None
    least = math.inf
    dtype = dtype_name(problem)
    for row in table(problem.name):
        if (row["op"], row["dtype"], row["taps"]) != (problem.op, dtype, problem.taps):
            continue
        steps = [
            abs(math.log2(max(own, 1) / row[f])) for f, own in (("m", problem.m), ("n", problem.n), ("k", problem.k))
        ]
        if max(steps) <= 1 and sum(steps) < least:
            best, least = row, sum(steps)
    return best


def dtype_name(problem: Problem) -> str:
    """The dtype in a table: fp32 with and without TF32 are two."""
    return "tf32" if problem.dtype == torch.float32 and problem.tf32 else str(problem.dtype).removeprefix("torch.")


def forget_tables() -> None:
    """Read the tables anew at the next choice, after a measurement."""
    table.cache_clear()
    nearest.cache_clear()
