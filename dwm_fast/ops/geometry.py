"""Geometry: what a convolution does beside its tensors; one value from the public door to the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dwm_fast.errors import InputError


@dataclass(frozen=True, slots=True)
class Geometry:
    """Stride, padding and dilation, each (rows, columns), and groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    SCHEMA: ClassVar[str] = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

    def flat(self) -> tuple[list[int], list[int], list[int], int]:
        """As torch's schema, and torch's own convolution, take it."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def output(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the output for shapes (B, C, H, W) and (O, C / groups, KH, KW); 0 where none fits."""
        rows, columns = (
            max(0, (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1)
            for size, window, stride, padding, dilation in zip(
                x[2:], weight[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns

    def check(self, x: Any) -> None:
        """InputError unless x is a batch of images and every number one that a convolution takes."""
        if x.dim() != 4:
            raise InputError(f"x has shape {tuple(x.shape)}; expected (batch, channels, rows, columns)")
        named = (("stride", self.stride, 1), ("padding", self.padding, 0), ("dilation", self.dilation, 1))
        for name, values, least in named:
            if len(values) != 2 or min(values) < least:
                raise InputError(f"{name} is {tuple(values)}; expected two numbers (rows, columns) of at least {least}")
