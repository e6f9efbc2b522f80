"""The built-in stand-in for PACS: seven procedural shapes in four rendering styles, not PACS images.

Made for trying the whole study without a download. The styles share the shapes' geometry and differ in
everything else (light, texture, palette, outline, paper), so a network that learns one is lost on the next.
Within a style figure and ground differ in a lasting way (lit on dark, warm on cool, inked, drawn): with free
polarity and colours a small network did not get past half of the test images from 80 examples per class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError
from dwm_fast.pacs.data import DOMAINS, DomainSet, PacsData, fingerprint
from dwm_fast.pacs.data.procedural_shapes import SHAPES, Draw, Pose, clutter, coverage

NAME = "procedural stand-in (not PACS)"
TRAIN_PER_CLASS = 80
TEST_PER_CLASS = 30


def procedural(
    image_size: int = 32,
    train_per_class: int = TRAIN_PER_CLASS,
    test_per_class: int = TEST_PER_CLASS,
    seed: int = 0,
) -> PacsData:
    """Draw the stand-in: photo, art, cartoon and sketch of disc, ring, triangle, square, star, cross, crescent.

    Every image has its own pose (rotation, size, position, stretch), colours, light and clutter. The same
    arguments give the same images; the test images of a seed do not depend on `train_per_class`.

    Args:
        image_size: side in pixels, at least 16.
        train_per_class, test_per_class: images of each class in each domain.
        seed: non-negative.
    """
    if image_size < 16 or train_per_class < 1 or test_per_class < 1 or seed < 0:
        raise InputError(
            f"image_size={image_size}, train_per_class={train_per_class}, test_per_class={test_per_class}, "
            f"seed={seed}: expected at least 16 pixels, one image per class and a seed >= 0"
        )
    domains = {d: _domain(i, image_size, train_per_class, test_per_class, seed) for i, d in enumerate(DOMAINS)}
    return PacsData(NAME, False, domains, SHAPES, image_size, fingerprint(domains))


def _domain(index: int, size: int, train_per_class: int, test_per_class: int, seed: int) -> DomainSet:
    halves, labels = [], []
    for half, per_class in enumerate((train_per_class, test_per_class)):
        own = torch.arange(len(SHAPES)).repeat_interleave(per_class)
        generator = torch.Generator().manual_seed((seed * len(DOMAINS) + index) * 2 + half)
        halves.append(_STYLES[index](own, Draw(len(own), size, generator)))
        labels.append(own)
    pixels = (torch.cat(halves).clamp(0, 1) * 255).round().to(torch.uint8)
    count = len(labels[0])
    names = [
        f"{DOMAINS[index]}/{SHAPES[label]}/{half}-{i:05d}"
        for half, own in zip(("train", "test"), labels, strict=True)
        for i, label in enumerate(own.tolist())
    ]
    return DomainSet(pixels, torch.cat(labels), torch.arange(count), torch.arange(count, len(pixels)), names)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (n, 3, 1, 1) from hue in turns, saturation and value in [0, 1], each (n, 1, 1)."""
    phase = torch.tensor([0.0, 2 / 3, 1 / 3]).view(1, 3, 1, 1)
    ramp = ((torch.remainder(hue[:, None] + phase, 1.0) * 6 - 3).abs() - 1).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - ramp))


def _mix(below: Tensor, above: Tensor, share: Tensor) -> Tensor:
    """`above` over `below` (n, 3, H, W) with opacity `share` (n, H, W)."""
    return below + (above - below) * share[:, None]


def _photo(labels: Tensor, draw: Draw) -> Tensor:
    """Rounded, lit bodies with a cast shadow on a dim blurred scene, with vignette and sensor noise."""
    x, y = draw.plane()
    pose = Pose.draw(draw, wobble=0.03)
    signed = pose.distance(labels, x, y)
    ground = draw.uniform(0.15, 0.5)
    scene = _rgb(draw.uniform(0, 1), draw.uniform(0.05, 0.4), ground)
    scene = scene + 0.04 * draw.noise(3, 3) + 0.10 * draw.noise(3) + 0.04 * draw.noise(9)
    for blob in clutter(draw, 2, 0.35):
        tint = _rgb(draw.uniform(0, 1), draw.uniform(0.05, 0.5), (ground + draw.uniform(-0.12, 0.12)).clamp(min=0.05))
        scene = _mix(scene, tint.expand_as(scene), 0.8 * coverage(blob, draw.size, 2.5))

    light = draw.uniform(0, 2 * math.pi)
    lx, ly = light.cos(), light.sin()
    shadow = pose.distance(labels, x + 0.16 * lx, y + 0.16 * ly)
    scene = scene * (1 - 0.5 * coverage(shadow, draw.size, 5.0))[:, None]

    height = (-signed).clamp(min=0) / (0.45 * pose.scale)
    height = (1 - (1 - height.clamp(max=1)) ** 2).sqrt() * 0.5
    slope_x = F.pad(height[..., 2:] - height[..., :-2], (1, 1)) * draw.size / 4
    slope_y = F.pad(height[..., 2:, :] - height[..., :-2, :], (0, 0, 1, 1)) * draw.size / 4
    norm = (1 + slope_x**2 + slope_y**2).sqrt()
    lambert = ((0.8 - 0.6 * (slope_x * lx + slope_y * ly)) / norm).clamp(min=0)
    body = _rgb(draw.uniform(0, 1), draw.uniform(0.3, 0.8), ground + draw.uniform(0.3, 0.5))
    body = body * (0.35 + 0.75 * lambert)[:, None] + (0.6 * lambert.clamp(0, 1) ** 24)[:, None]
    body = body * (1 + 0.10 * draw.noise(8))
    image = _mix(scene, body, coverage(signed, draw.size, 1.6))
    vignette = 1 - draw.uniform(0, 0.3) * (x**2 + y**2) / 2
    grain = torch.randn(image.shape, generator=draw.generator) * draw.uniform(0.01, 0.03)[:, None]
    return image * vignette[:, None] + grain


def _strokes(draw: Draw, angle: Tensor, cells: int) -> Tensor:
    """Brush strokes (n, 1, H, W), about -1 to 1: value noise stretched fourfold along `angle` (n, 1, 1)."""
    x, y = draw.plane()
    along = (angle.cos() * x + angle.sin() * y) * 0.18
    across = (angle.cos() * y - angle.sin() * x) * 0.7
    grid = draw.uniform(-1, 1, 1, cells, cells)
    return F.grid_sample(grid, torch.stack((along, across), dim=-1), padding_mode="reflection", align_corners=False)


def _art(labels: Tensor, draw: Draw) -> Tensor:
    """Oil paint: a dark warm figure on a cool ground, in strokes, ragged outlines, impasto, canvas weave."""
    x, y = draw.plane()
    pose = Pose.draw(draw, wobble=0.05)
    hue = draw.uniform(0.4, 0.75)
    flow, own_flow = draw.uniform(0, math.pi), draw.uniform(0, math.pi)
    back, front = _strokes(draw, flow, 14), _strokes(draw, own_flow, 14)
    ragged = 0.06 * _strokes(draw, own_flow, 20)[:, 0]
    signed = pose.distance(labels, x, y) + ragged

    value = draw.uniform(0.6, 0.9)
    ground = _rgb(hue + 0.08 * back[:, 0], draw.uniform(0.2, 0.6), (value + 0.15 * back[:, 0]).clamp(0.05, 1))
    for blob in clutter(draw, 2, 0.4):
        tint_hue = hue + draw.uniform(-0.15, 0.15)
        dab = _rgb(
            tint_hue + 0.08 * back[:, 0],
            draw.uniform(0.3, 0.8),
            (value + draw.uniform(-0.2, 0.2) + 0.15 * back[:, 0]),
        )
        ground = _mix(ground, dab, 0.8 * coverage(blob + ragged, draw.size, 2.0))
    own_hue = hue + draw.uniform(0.4, 0.6) + 0.06 * front[:, 0]
    own_value = (value - draw.uniform(0.25, 0.5) + 0.15 * front[:, 0]).clamp(0.05, 1)
    body = _rgb(own_hue, draw.uniform(0.5, 1.0), own_value)
    image = _mix(ground, body, coverage(signed, draw.size, 1.5))

    relief = _mix(back, front, coverage(signed, draw.size))
    lit = F.pad(relief[..., 1:, :] - relief[..., :-1, :], (0, 0, 0, 1))
    weave = torch.cos(x * draw.size * 1.57) * torch.cos(y * draw.size * 1.57)
    return image + 0.10 * lit + 0.03 * weave[:, None]


def _cartoon(labels: Tensor, draw: Draw) -> Tensor:
    """Flat saturated colours, thick dark outlines, one hard highlight, a sky and a hill behind."""
    x, y = draw.plane()
    pose = Pose.draw(draw, wobble=0.02)
    signed = pose.distance(labels, x, y)
    ink = _rgb(draw.uniform(0, 1), draw.uniform(0, 0.6), draw.uniform(0.02, 0.2))
    ground = _rgb(draw.uniform(0, 1), draw.uniform(0.1, 0.6), draw.uniform(0.8, 1.0)).expand(
        -1, -1, draw.size, draw.size
    )
    hill = (
        y - draw.uniform(-0.6, 0.9) - draw.uniform(0.05, 0.3) * torch.sin(x * draw.uniform(1, 4) + draw.uniform(0, 6))
    )
    green = _rgb(draw.uniform(0, 1), draw.uniform(0.3, 0.8), draw.uniform(0.6, 0.95))
    width = draw.uniform(0.035, 0.075)
    ground = _mix(ground, green, coverage(-hill, draw.size))
    for blob in clutter(draw, 3, 0.4):
        flat = _rgb(draw.uniform(0, 1), draw.uniform(0.3, 0.9), draw.uniform(0.6, 1.0))
        ground = _mix(ground, flat, coverage(blob, draw.size))
        ground = _mix(ground, ink, coverage(blob.abs() - 0.4 * width, draw.size) * draw.chance(0.5))
    body = _rgb(draw.uniform(0, 1), draw.uniform(0.55, 1.0), draw.uniform(0.75, 1.0))
    shade = pose.distance(labels, x + 0.12, y + 0.12)
    body = _mix(body * 0.72, body, coverage(shade, draw.size))
    gleam = torch.hypot(x - pose.centre_x + 0.3 * pose.scale, y - pose.centre_y + 0.35 * pose.scale) - 0.12 * pose.scale
    body = _mix(body, torch.ones(1, 3, 1, 1), coverage(gleam, draw.size) * draw.chance(0.7))
    image = _mix(ground, body, coverage(signed, draw.size))
    return _mix(image, ink, coverage(signed.abs() - width, draw.size))


def _sketch(labels: Tensor, draw: Draw) -> Tensor:
    """Pencil on paper: two shaky passes over the outline, uneven pressure, some hatching and stray lines."""
    x, y = draw.plane()
    pose = Pose.draw(draw, wobble=0.05)
    paper = draw.uniform(0.9, 1.0) - 0.02 * draw.noise(12)[:, 0]
    dark = torch.zeros_like(x)
    for _ in range(2):
        shake = draw.noise(6, 2) * 0.045
        signed = pose.distance(labels, x + shake[:, 0], y + shake[:, 1])
        pressure = (0.72 + 0.45 * draw.noise(5)[:, 0]).clamp(0.1, 1)
        dark = torch.maximum(dark, pressure * coverage(signed.abs() - draw.uniform(0.012, 0.03), draw.size))
    angle, pitch = draw.uniform(0, math.pi), draw.uniform(0.16, 0.3)
    ruled = angle.cos() * x + angle.sin() * y + 0.02 * draw.noise(5)[:, 0]
    lines = (torch.remainder(ruled, pitch) - pitch / 2).abs() - 0.012
    where = coverage(signed + 0.05, draw.size) * draw.chance(0.4)
    dark = torch.maximum(dark, 0.45 * where * coverage(lines, draw.size))
    for stray in clutter(draw, 2, 0.7):
        pressure = (0.25 + 0.3 * draw.noise(4)[:, 0]).clamp(0, 0.5)
        dark = torch.maximum(dark, pressure * coverage(stray.abs() - 0.01, draw.size) * draw.chance(0.6))
    grey = paper - dark * draw.uniform(0.6, 0.95)
    return grey[:, None].expand(-1, 3, -1, -1)


_STYLES: tuple[Callable[[Tensor, Draw], Tensor], ...] = (_photo, _art, _cartoon, _sketch)
