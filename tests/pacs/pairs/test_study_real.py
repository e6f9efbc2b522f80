"""The study's stages on a few images of the real PACS, from the given weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dwm_fast.methods import LearnedMask, TrainOptions
from dwm_fast.pacs.config import from_dict, real_defaults
from dwm_fast.pacs.data import DomainSet, PacsData, load_pacs
from dwm_fast.pacs.pairs.lab import PairLab as Lab
from dwm_fast.pacs.pairs.lab import Run

from ..data.test_data_real import FILE, FOLDER
from ..test_backbones import PARTIAL

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not (FILE.is_file() and PARTIAL.is_file()),
        reason=f"no {FILE.name} or {PARTIAL.name}; name their folders in DWM_FAST_PACS and DWM_FAST_WEIGHTS",
    ),
]
PER_CLASS = 8


def few(images: DomainSet, positions: torch.Tensor) -> torch.Tensor:
    """The first PER_CLASS positions of each class."""
    labels = images.labels[positions]
    return torch.cat([positions[labels == c][:PER_CLASS] for c in range(7)])


@pytest.fixture(scope="module")
def subset() -> PacsData:
    data = load_pacs(FILE, FOLDER / "splits", 32, ["photo", "sketch"])
    fewer = {
        name: dataclasses.replace(images, train=few(images, images.train), test=few(images, images.test))
        for name, images in data.domains.items()
    }
    return dataclasses.replace(data, domains=fewer)


def test_photo_to_sketch_runs_from_the_given_weights(subset: PacsData, tmp_path: Path) -> None:
    quick = TrainOptions(epochs=3, lr=1e-3, batch_norm="shared")
    mask = LearnedMask(epochs=1, lr=1.5, coefficient=1.0)
    config = dataclasses.replace(
        from_dict({"sources": "photo", "targets": "sketch"}, real_defaults()),
        weights=str(PARTIAL),
        image_size=32,
        train_size=32,
        batch_size=16,
        device="cpu",
        source=TrainOptions(epochs=6, lr=1e-3),
        binary=mask,
        tune={"none": (quick,), "binary": (quick,)},
    )
    lab = Lab(config, subset, tmp_path, torch.device("cpu"))
    figures = lab.source("photo", 0).figures
    assert figures["accuracy"] > 2 / 7, "three epochs from such weights are better than guessing"
    found = lab.mask("photo", "binary", 0)
    assert 0.05 < found.figures["fraction_kept"] < 0.95
    assert found.figures["total"] == 11_166_912 + 512 * 7  # the convolutions of ResNet-18, and the head
    (plain,) = lab.rows(Run("photo", "sketch", "none", "-", 0))
    shared, masked = lab.rows(Run("photo", "sketch", "binary", "S_start", 0))
    assert masked["source_after"] == found.figures["masked_accuracy"]
    assert plain["source_before"] == shared["source_before"] == figures["accuracy"]
