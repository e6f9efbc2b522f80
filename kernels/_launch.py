"""Launch parameters: of walks over a network, of masked products, and one way for tests to force others."""

import contextlib
import dataclasses
from collections.abc import Iterator

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
        _check_powers(self, block=128, strided=128, groups=32, num_warps=1)
        if self.strided > self.block:
            raise ValueError(f"strided is {self.strided}; expected at most block, which is {self.block}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile of one program of a masked product: block_n x block_k of the weight, block_m rows; all powers of two.

    block_n: at least 16. block_k: at least 32, a whole word of bits. block_m: 1 takes no matrix instruction.
    splits: programs that share a sum. stages: tiles in flight. num_warps: warps a program.
    group: of `bank`, the domains for which a program keeps its tile of the weight; 0 takes the kernel for many rows.
    """

    block_n: int
    block_k: int
    block_m: int
    splits: int = 1
    num_warps: int = 4
    stages: int = 3
    group: int = 0

    def __post_init__(self) -> None:
        _check_powers(self, block_n=16, block_k=32, block_m=1, num_warps=1)
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits is {self.splits} and stages {self.stages}; expected at least 1")


def _check_powers(parameters: object, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(parameters, name)
        if value < smallest or value & (value - 1):
            raise ValueError(f"{name} is {value}; expected a power of two of at least {smallest}")


_TABLE = {
    "sample": Launch(block=2048),
    "sample_backward": Launch(block=2048),
    "bits": Launch(block=4096),
    "update": Launch(block=1024, strided=256),
    "kernel_soft": Launch(block=512),
    "patterns": Launch(block=128, strided=128),
    "importance": Launch(block=2048, strided=256),
}


@dataclasses.dataclass(frozen=True)
class _Forced:
    fields: dict[str, int] = dataclasses.field(default_factory=dict)
    tiles: Tiles | None = None
    wide: bool = False


# Of the process, not of the thread: autograd runs the backward of CUDA tensors on threads of its own.
_forced = _Forced()


def launch_parameters(kernel: str) -> Launch:
    """The tile sizes that `kernel` (a name of the table above) runs with."""
    return dataclasses.replace(_TABLE[kernel], **_forced.fields) if _forced.fields else _TABLE[kernel]


def forced_tiles() -> Tiles | None:
    """The tiles that a test wants every product to run with."""
    return _forced.tiles


def wide_offsets() -> bool:
    """Whether a test wants int64 offsets inside tiles."""
    return _forced.wide


@contextlib.contextmanager
def override_launch(tiles: Tiles | None = None, *, wide: bool = False, **fields: int) -> Iterator[None]:
    """Inside the block walks run with these fields of `Launch` and products with `tiles`, instead of their own.

    `wide`: int64 offsets inside the tiles of products. What is left out stays as around the block. Masks must not
    change, and values of products by rounding of their sums only.
    """
    global _forced
    outer = _forced
    _forced = _Forced(fields or outer.fields, tiles or outer.tiles, wide or outer.wide)
    try:
        yield
    finally:
        _forced = outer
