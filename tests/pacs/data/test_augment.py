"""Augmentation cuts, flips and normalises as stated, follows its generator, and never waits for the device."""

from __future__ import annotations

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.pacs.data.augment import IMAGENET_MEAN, IMAGENET_STD, epoch_batches, normalise, random_resized_crop_flip

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramps(count: int, size: int = 64) -> torch.Tensor:
    """Images whose red channel is the column and whose green channel is the row, so a crop shows where it was cut."""
    axis = torch.arange(size)
    column, row = axis.expand(size, size), axis[:, None].expand(size, size)
    return torch.stack((column, row, torch.zeros(size, size))).to(torch.uint8).expand(count, 3, size, size)


def test_normalise_is_the_published_formula() -> None:
    images = torch.randint(0, 256, (5, 3, 7, 9), generator=seeded(), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.double() / 255 - mean) / std
    found = normalise(images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert normalise(images, channels_last=False).is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_whole_image_without_flip_is_the_image_itself() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    found = random_resized_crop_flip(images, 16, seeded(1), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    torch.testing.assert_close(found, normalise(images), rtol=0, atol=2e-4)


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.randint(0, 256, (400, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    found = random_resized_crop_flip(images, 8, seeded(2), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = normalise(images)
    same = (found - plain).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (found - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-3
    assert torch.all(same | mirrored)
    assert 160 < int(mirrored.sum()) < 240


def test_crops_have_the_stated_areas_and_shapes_and_stay_inside() -> None:
    size, count = 64, 500
    found = random_resized_crop_flip(
        ramps(count), 32, seeded(3), scale=(0.25, 0.5), ratio=(0.5, 2.0), flip=False, **UNIT
    )
    red, green = found[:, 0] * 255, found[:, 1] * 255
    width = (red[:, 16, -1] - red[:, 16, 0]) * 32 / 31
    height = (green[:, -1, 16] - green[:, 0, 16]) * 32 / 31
    area, ratio = width * height / size**2, width / height
    assert area.min() > 0.24
    assert area.max() < 0.51
    assert 0.49 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.05
    assert abs(ratio.log().mean()) < 0.1
    assert found.min() >= 0
    assert red.max() < size - 1 + 1e-3
    assert red[:, 16, 0].min() < 3
    assert red[:, 16, -1].max() > size - 4


def test_same_generator_state_same_crops_and_another_another() -> None:
    first, again, other = (random_resized_crop_flip(ramps(6), 24, seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, 3, 24, 24)
    assert first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_images_are_left_as_they_were() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    before = images.clone()
    normalise(images)
    random_resized_crop_flip(images, 8, seeded())
    assert torch.equal(images, before)


def test_epoch_visits_every_index_once_in_a_drawn_order() -> None:
    indices = torch.arange(100, 123)
    first, again, other = (torch.cat(epoch_batches(indices, 5, seeded(s))) for s in (1, 1, 2))
    assert torch.equal(first.sort().values, indices)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [len(b) for b in epoch_batches(indices, 5, seeded())] == [5, 5, 5, 5, 3]
    assert [len(b) for b in epoch_batches(indices, 5, seeded(), drop_last=True)] == [5, 5, 5, 5]
    assert [len(b) for b in epoch_batches(indices, 50, seeded(), drop_last=True)] == [23]


def test_wrong_input_is_refused() -> None:
    images = ramps(2)
    with pytest.raises(InputError, match="expected uint8"):
        normalise(images.float())
    with pytest.raises(InputError, match="expected uint8"):
        random_resized_crop_flip(images[0], 8)
    for arguments in ({"size": 0}, {"size": 8, "scale": (0.0, 1.0)}, {"size": 8, "scale": (0.5, 1.2)}):
        with pytest.raises(InputError, match="size >= 1"):
            random_resized_crop_flip(images, **arguments)
    with pytest.raises(InputError, match="batch_size=0"):
        epoch_batches(torch.arange(3), 0)
    with pytest.raises(InputError, match="one device"):
        random_resized_crop_flip(images.to("meta"), 8, seeded())


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    images = ramps(8).cuda()
    indices = torch.arange(8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    normalise(images)  # the first call copies mean and std
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in epoch_batches(indices, 4, generator):
            random_resized_crop_flip(images[batch], 32, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
