"""Launch parameters: one small dataclass, one deterministic function, and a way for tests to override a field."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

OPTIONS = {"enable_fp_fusion": False}
"""Launch options of every kernel here: contraction is off, so a comparison rounds the same wherever it is inlined."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Tile sizes of one kernel.

    block: elements per program over tensors in logical order; a power of two, at least 128, so that a program's bits
        are whole 16-byte units.
    strided: elements per program over other layouts; a power of two, at least 128, at most `block`.
    groups: per program over 3x3 channels_last tensors, groups of four input channels times nine taps; a power of two,
        at least 32 (32 * 36 bits are nine 16-byte units).
    num_warps: warps per program.
    """

    block: int = 2048
    strided: int = 512
    groups: int = 128
    num_warps: int = 4

    def __post_init__(self) -> None:
        for name, least in (("block", 128), ("strided", 128), ("groups", 32), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} is {value}; expected a power of two of at least {least}")
        if self.strided > self.block:
            raise ValueError(f"strided is {self.strided}; expected at most block, which is {self.block}")


_TABLE = {
    "sample": Launch(block=2048),
    "sample_backward": Launch(block=2048),
    "bits": Launch(block=4096),
    "update": Launch(block=1024, strided=256),
    "kernel_soft": Launch(block=512),
    "importance": Launch(block=2048, strided=256),
}
_override: ContextVar[dict[str, int] | None] = ContextVar("dwm_fast_launch", default=None)


def launch_parameters(kernel: str) -> Launch:
    """The tile sizes that `kernel` (a name of the table above) runs with."""
    fields = _override.get()
    return dataclasses.replace(_TABLE[kernel], **fields) if fields else _TABLE[kernel]


@contextlib.contextmanager
def override_launch(**fields: int) -> Iterator[None]:
    """Inside the block every kernel runs with these fields instead of its own; results must not change."""
    token = _override.set(fields)
    try:
        yield
    finally:
        _override.reset(token)
