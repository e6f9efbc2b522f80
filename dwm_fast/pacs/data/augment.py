"""Batches and augmentation on the images' own device: no workers, no waiting for the device."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dwm_fast.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]
BatchIndices = tuple[Tensor, ...]


def normalise(
    images: Tensor, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, channels_last: bool = True
) -> Tensor:
    """(images / 255 - mean) / std as float32, (B, 3, H, W) uint8 in, same shape out.

    Args:
        images: uint8, 0 to 255, on any device.
        mean, std: per channel, in units of the full range 0 to 1 (ImageNet's by default).
        channels_last: memory format of the result.
    """
    _check_images(images)
    standard = _standardise(images.float(), mean, std)
    return standard.contiguous(memory_format=torch.channels_last) if channels_last else standard


def random_resized_crop_flip(
    images: Tensor,
    size: int,
    generator: torch.Generator | None = None,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
) -> Tensor:
    """A random crop of each image, resized to `size` and flipped half of the time, then normalised.

    Each crop covers a fraction of the area uniform in `scale`, with an aspect ratio (width / height)
    log-uniform in `ratio`; a side that would exceed the image is cut to it. Sampling is bilinear with
    reflected borders and no low-pass filter, so load the images at about the size they are trained at.

    Args:
        images: (B, 3, H, W) uint8.
        size: side of the result in pixels.
        generator: on the device of `images`; the same state gives the same crops.

    Returns:
        (B, 3, size, size) float32, channels_last.

    Raises:
        InputError: images of another kind, impossible ranges, generator on another device.
    """
    _check_images(images)
    if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise InputError(f"size={size}, scale={scale}, ratio={ratio}: expected size >= 1, 0 < low <= high, scale <= 1")
    if generator is not None and generator.device.type != images.device.type:
        raise InputError(f"generator is on {generator.device}, images on {images.device}; put them on one device")
    grid = _crop_grid(images, size, generator, scale, ratio, flip)
    crops = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _standardise(crops, mean, std).contiguous(memory_format=torch.channels_last)


def epoch_batches(
    indices: Tensor, batch_size: int, generator: torch.Generator | None = None, drop_last: bool = False
) -> BatchIndices:
    """All of `indices` (N,) once, in an order drawn from `generator`, cut into batches of `batch_size`.

    The order is drawn at the call, so the generator's state afterwards does not depend on how far the batches
    were used. With `drop_last` a shorter last batch is left out, unless it is the only one. `generator` must
    be on the device of `indices`.
    """
    if batch_size < 1 or indices.ndim != 1 or indices.numel() == 0:
        raise InputError(f"batch_size={batch_size}, indices {tuple(indices.shape)}: expected at least 1 and (N >= 1,)")
    if generator is not None and generator.device.type != indices.device.type:
        raise InputError(f"generator is on {generator.device}, indices on {indices.device}; put them on one device")
    order = indices[torch.randperm(len(indices), generator=generator, device=indices.device)]
    batches = tuple(order[i : i + batch_size] for i in range(0, len(order), batch_size))
    return batches[:-1] if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches


def _crop_grid(
    images: Tensor,
    size: int,
    generator: torch.Generator | None,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> Tensor:
    """Sampling positions (B, size, size, 2) in [-1, 1]: x, y of every output pixel.

    Crops have upright sides, so the two coordinates are built apart; the matrix product of `affine_grid`
    would round positions to TF32 where that is allowed.
    """
    count, height, width = images.shape[0], images.shape[2], images.shape[3]
    draw = torch.rand((5, count), generator=generator, device=images.device)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(log_low + (log_high - log_low) * draw[1]) * (height / width)
    half_w = (area * aspect).sqrt().clamp(max=1.0)
    half_h = (area / aspect).sqrt().clamp(max=1.0)
    centre_x = (2 * draw[2] - 1) * (1 - half_w)
    centre_y = (2 * draw[3] - 1) * (1 - half_h)
    if flip:
        half_w = torch.where(draw[4] < 0.5, -half_w, half_w)
    steps = (torch.arange(size, device=images.device, dtype=torch.float32) * 2 + 1) / size - 1
    x = torch.addcmul(centre_x[:, None], half_w[:, None], steps)  # [B, size]
    y = torch.addcmul(centre_y[:, None], half_h[:, None], steps)  # [B, size]
    shape = (count, size, size)
    return torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), dim=-1)


@lru_cache(maxsize=16)
def _factors(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1, 3, 1, 1) factor and offset, y = x * factor + offset; kept, as a copy to the device would wait."""
    factor = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, 3, 1, 1)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, 3, 1, 1)
    return factor, offset


def _standardise(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """In place on fresh pixels, before channels_last: a factor per innermost channel costs ten times as much."""
    factor, offset = _factors(tuple(mean), tuple(std), pixels.device)
    return pixels.mul_(factor).add_(offset)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images {images.dtype} {tuple(images.shape)}: expected uint8 (B, 3, H, W)")
