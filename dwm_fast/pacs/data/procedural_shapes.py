"""Geometry of the procedural stand-in: seven shapes as signed distances, posed at random in batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ("disc", "ring", "triangle", "square", "star", "cross", "crescent")


@dataclass(frozen=True)
class Draw:
    """Random numbers of one batch of n images of size x size pixels; every draw advances one generator."""

    n: int
    size: int
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers (n, *shape), shaped (n, 1, 1) without `shape`, to go with images (n, H, W)."""
        dims = (self.n, *shape) if shape else (self.n, 1, 1)
        return low + (high - low) * torch.rand(dims, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
        """Zeros and ones (n, 1, 1), one with the given probability."""
        return (self.uniform(0, 1) < probability).float()

    def noise(self, cells: int, channels: int = 1) -> Tensor:
        """Smooth value noise (n, channels, H, W), about -1 to 1, with `cells` bumps along a side."""
        grid = self.uniform(-1, 1, channels, cells + 3, cells + 3)
        large = F.interpolate(grid, scale_factor=self.size / cells, mode="bicubic", align_corners=False)
        margin = (large.shape[-1] - self.size) // 2
        return large[..., margin : margin + self.size, margin : margin + self.size]

    def plane(self) -> tuple[Tensor, Tensor]:
        """Pixel centres x, y (n, H, W) on the canvas [-1, 1] x [-1, 1], y downwards."""
        axis = (torch.arange(self.size, dtype=torch.float32) * 2 + 1) / self.size - 1
        shape = (self.n, self.size, self.size)
        return axis[None, None, :].expand(shape), axis[None, :, None].expand(shape)


def _regular(x: Tensor, y: Tensor, corners: int, radius: float, inner: float) -> Tensor:
    """Star of `corners` tips at `radius`, notches at `inner`; inner = radius cos(pi/corners) is the polygon.

    Signed distance to the line from tip to notch in the sector folded around a tip; exact but at corners.
    """
    half = math.pi / corners
    angle = torch.remainder(torch.atan2(x, -y) + half, 2 * half) - half
    rho = torch.hypot(x, y)
    px, py = rho * angle.cos(), rho * angle.sin().abs()
    ex, ey = inner * math.cos(half) - radius, inner * math.sin(half)
    length = math.hypot(ex, ey)
    return ((px - radius) * ey - py * ex) / length


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.86


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.68).abs() - 0.22


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _regular(x, y + 0.12, 3, 1.12, 1.12 * math.cos(math.pi / 3))


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.76


def _star(x: Tensor, y: Tensor) -> Tensor:
    return _regular(x, y, 5, 1.08, 0.46)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 0.94, short - 0.30)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x + 0.1, y) - 0.92, 0.74 - torch.hypot(x - 0.34, y))


_DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _disc,
    _ring,
    _triangle,
    _square,
    _star,
    _cross,
    _crescent,
)


def distance(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (n, H, W) of points to the unit-sized shapes of labels (n,); negative inside."""
    result = torch.empty_like(x)
    for label, shape in enumerate(_DISTANCES):
        rows = labels == label
        result[rows] = shape(x[rows], y[rows])
    return result


@dataclass(frozen=True)
class Pose:
    """Where each shape lies: centre, rotation, stretch, size, all (n, 1, 1), and its outline's wobble (n, H, W)."""

    centre_x: Tensor
    centre_y: Tensor
    angle: Tensor
    stretch: Tensor
    scale: Tensor
    bend_x: Tensor
    bend_y: Tensor

    @classmethod
    def draw(cls, draw: Draw, wobble: float) -> Pose:
        """Up to 34 degrees of tilt, 0.45 to 0.78 in size, a fifth of stretch, anywhere that keeps most in view."""
        scale = draw.uniform(0.45, 0.78)
        room = 1.0 - 0.95 * scale
        bends = draw.noise(4, 2) * wobble
        return cls(
            centre_x=draw.uniform(-1, 1) * room,
            centre_y=draw.uniform(-1, 1) * room,
            angle=draw.uniform(-0.6, 0.6),
            stretch=draw.uniform(-0.2, 0.2).exp(),
            scale=scale,
            bend_x=bends[:, 0],
            bend_y=bends[:, 1],
        )

    def distance(self, labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance (n, H, W) in canvas units to the posed shape, seen at points x, y."""
        dx, dy = x + self.bend_x - self.centre_x, y + self.bend_y - self.centre_y
        cos, sin = self.angle.cos(), self.angle.sin()
        u = (cos * dx + sin * dy) / (self.scale * self.stretch)
        v = (cos * dy - sin * dx) * self.stretch / self.scale
        return distance(labels, u, v) * self.scale


def coverage(signed: Tensor, size: int, softness: float = 1.0) -> Tensor:
    """Share of a pixel inside: 1 within, 0 outside, a ramp of `softness` pixels across the border."""
    return (0.5 - signed * size / (2 * softness)).clamp(0, 1)


def clutter(draw: Draw, count: int, largest: float) -> list[Tensor]:
    """Signed distances (n, H, W) of `count` random bars and ellipses, as they lie about in a scene."""
    x, y = draw.plane()
    found = []
    for _ in range(count):
        angle = draw.uniform(0, math.pi)
        dx, dy = x - draw.uniform(-1.1, 1.1), y - draw.uniform(-1.1, 1.1)
        u = (angle.cos() * dx + angle.sin() * dy) / draw.uniform(0.08, largest)
        v = (angle.cos() * dy - angle.sin() * dx) / draw.uniform(0.08, largest)
        round_shape = (torch.hypot(u, v) - 1) * 0.2
        bar = (torch.maximum(u.abs(), v.abs()) - 1) * 0.2
        found.append(torch.where(draw.chance(0.5) > 0, round_shape, bar))
    return found
