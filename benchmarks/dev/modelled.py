"""What a GPU would need at the least, by arithmetic: bytes over bandwidth, instructions over issue rate. Not measured.

The table of docs/benchmarks.md comes from here. It never becomes a row of a result file.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bench_bank import mixed_bytes
from ..bench_linear import packed_bytes
from ..bench_sample import backward_bytes, forward_bytes
from ..bench_update import ADAMW_BYTES, MASK_ADAM_BYTES
from ..table import shown_number

COPY = 3.0e12
"""Bytes a second that a device-to-device copy moves on an H100 SXM, read and written: measured, by a copy alone."""
ISSUE = 33.5e12
"""Instructions of single lanes a second that an H100 SXM issues at most: half of the 67 TFLOP/s of fp32 that its data
sheet gives, as a multiply-add counts as two there."""
RESNET18 = 11_170_496
"""Weights of ResNet-18's masked layers."""
_SIDE = 4096
_LARGE = _SIDE**2


@dataclass(frozen=True)
class Model:
    """An operation on `weights` weights: bytes that must move, and instructions a weight (None: not counted)."""

    name: str
    weights: int
    moved: int
    instructions: float | None

    @property
    def memory(self) -> float:
        """Microseconds that the bytes take."""
        return self.moved / COPY * 1e6

    @property
    def issue(self) -> float:
        """Microseconds that the instructions take; 0 where they are not counted."""
        return self.weights * (self.instructions or 0.0) / ISSUE * 1e6

    @property
    def cells(self) -> list[str]:
        """A line of the table."""
        counted = self.instructions is not None
        return [
            self.name,
            f"{self.moved / self.weights:.3g}",
            f"{self.instructions:g}" if counted else "",
            shown_number(self.memory),
            shown_number(self.issue) if counted else "",
            shown_number(max(self.memory, self.issue)),
        ]


def _kept_bytes(rows: int, share: float) -> int:
    """Read x, bits and the kept weights, write y; two bytes a number."""
    return 2 * 2 * rows * _SIDE + _LARGE // 8 + round(2 * share * _LARGE)


MODELS = (
    Model("sample forward", RESNET18, forward_bytes(RESNET18, 4, pack=False), 53),
    Model("sample backward", RESNET18, backward_bytes(RESNET18, 4), 62),
    Model("MaskAdam", RESNET18, MASK_ADAM_BYTES * RESNET18, 177),
    # Gradient, logits and moments, and two scales for 128 weights.
    Model("StreamedAdam's step, fixed16 logits, 8-bit moments", RESNET18, 12 * RESNET18 + RESNET18 // 8, 336),
    Model("FrozenAdamW, all weights free", RESNET18, ADAMW_BYTES * RESNET18 + RESNET18 // 8, 134),
    Model("apply", RESNET18, 8 * RESNET18 + RESNET18 // 8, 13),
    Model("pack", RESNET18, RESNET18 + RESNET18 // 8, 8.7),
    Model("unpack", RESNET18, RESNET18 + RESNET18 // 8, 11),
    Model("linear from bits, M = 16, bf16", _LARGE, packed_bytes(16, _SIDE, _SIDE, 2), 9.7),
    Model("linear from kept weights, M = 1, bf16, 30 % kept", _LARGE, _kept_bytes(1, 0.3), 9.3),
    Model("16 domains of 4 rows, bf16", _LARGE, mixed_bytes(16, 4, _SIDE, _SIDE, 2), None),
)
"""Instructions a weight are static counts of compiled code (Triton 3.6, sm_90): a kernel of the compile gate over
contiguous fp32 tensors, with bits, by the weights a thread takes; of products their loop alone, of kept weights as
nvcc 13.0 compiled it."""


def modelled_block() -> str:
    """Markdown of the table."""
    lines = [
        "| what | bytes a weight | instructions a weight | µs for the bytes | µs for the instructions | at least µs |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|", *(f"| {' | '.join(model.cells)} |" for model in MODELS)]
    return "\n".join(lines) + "\n"
