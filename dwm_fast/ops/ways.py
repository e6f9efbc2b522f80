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
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwm_fast.errors import BackendUnavailable, InputError
from dwm_fast.ops.geometry import Geometry
from dwm_fast.ops.measured import nearest
from dwm_fast.ops.problem import FLOATS, PACKED_ROWS, Problem, problem_of

ONE_PASS, STAGED = "one-pass", "staged"
WAYS = (ONE_PASS, STAGED)

CPU_ROWS = 8
"""Rows up to which the C++ extension reads bits itself; beyond, unpacking once and the vendor's product win."""
LARGE_WEIGHT = 1 << 22
"""Weights (16 MiB in fp32) that no second-level cache holds: reading them is what a product of few rows costs."""
CPU_ROWS_LARGE = 16
"""The same limit for large weights, whose masked copy would have to be written to memory and read again."""
KEPT_ROWS = 256
"""Rows up to which the C++ extension multiplies kept weights as it expands them: putting the masked weight together
costs more (2048 x 2048, kept 0.3, one thread: 74 against 80 ms at 256 rows, 446 against 165 at 1024)."""
DRAWN_ROWS = 16
"""A tile with logits, weights and four Philox words an element in registers holds no more rows without spilling."""
FMA_ROWS = 16
"""fp32 without TF32 has no matrix instruction: beyond, the vendor's tiles are better than ours."""

_forced: str | None = None


@dataclass(frozen=True)
class Choice:
    """The way taken and the reason, in words; and of what, where a backend is asked."""

    way: str
    why: str
    problem: Problem | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.way}: {self.why}"


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


def forced_way() -> str | None:
    """The way that `use_way` forces; None where it does not."""
    return _forced


def choose_for(
    op: str, backend: str, x: Tensor, weight: Tensor, logits: Tensor | None = None, geometry: Geometry | None = None
) -> Choice:
    """The way in which a masked product is computed, and why: asked before `backend` is entered.

    Tensors as in `problem_of`. Staged means the operation's reference, whose parts are operations themselves.
    """
    if backend == "reference":
        return Choice(STAGED, "the backend 'reference' computes it and has one way")
    problem = problem_of(op, backend, x, weight, logits, geometry)
    choice = Choice(STAGED, problem.obstacle) if problem.obstacle else choose(problem)
    return Choice(choice.way, choice.why, problem)


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
        return Choice(
            way,
            f"measured on {problem.name} at M={row['m']}, N={row['n']}, K={row['k']}: one pass "
            f"{row['one_pass_us']:.1f} us, staged {row['staged_us']:.1f} us",
        )
    return _by_theory(problem)


def one_pass(problem: Problem) -> bool:
    """Whether `problem` is computed in one pass."""
    return choose(problem).way == ONE_PASS


def _obstacle(problem: Problem) -> str:
    """Why one pass cannot compute this, or ""."""
    if problem.device == "cpu":
        if problem.op == "linear_kept":
            return "" if problem.dtype in FLOATS else f"the CPU's kernel takes 16 or 32 bits, not {problem.dtype}"
        if problem.op != "linear_packed":
            return "on a CPU only linear_packed and linear_kept have one-pass kernels"
        return "" if problem.dtype == torch.float32 else f"the CPU's one-pass kernel takes float32, not {problem.dtype}"
    if problem.op == "linear_kept":
        return _obstacle_of_kept(problem)
    if problem.dtype not in FLOATS:
        return f"one-pass kernels take float32, bfloat16 and float16, not {problem.dtype}"
    if problem.groups > 1 and problem.k == problem.taps:
        return "a depthwise convolution has one channel a group, too few for a tile"
    return ""


def _obstacle_of_kept(problem: Problem) -> str:
    """Why a GPU's kernel of kept weights cannot compute this, or ""."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"a GPU's kernel of kept weights takes bfloat16 and float16, not {problem.dtype}"
    if problem.k % 32:
        return f"a GPU's kernel of kept weights takes rows of whole words of bits, 32 weights each, not {problem.k}"
    if problem.m > PACKED_ROWS:
        return f"a GPU's kernel of kept weights takes {PACKED_ROWS} rows of x at most, not {problem.m}"
    return ""


def _by_theory(problem: Problem) -> Choice:
    if not problem.linear:
        return Choice(STAGED, "convolutions run in one pass only where a table of this device says that it is faster")
    if problem.op == "linear_kept":
        limit = KEPT_ROWS if problem.device == "cpu" else PACKED_ROWS
    elif problem.device == "cpu":
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
