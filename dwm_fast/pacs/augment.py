"""The short way to `dwm_fast.pacs.data.augment`."""

from dwm_fast.pacs.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    epoch_batches,
    normalise,
    random_resized_crop_flip,
)

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "epoch_batches", "normalise", "random_resized_crop_flip"]
