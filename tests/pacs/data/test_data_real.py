"""The real PACS: all of it loads, with the published counts and lists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dwm_fast.pacs.data import PacsData, load_pacs

COUNTS = {"photo": 1670, "art": 2048, "cartoon": 2344, "sketch": 3929}  # Li et al., ICCV 2017
HELD_OUT = {"photo": 171, "art": 208, "cartoon": 237, "sketch": 398}  # lines of the official crossval lists
FOLDER = Path(os.environ.get("DWM_FAST_PACS", Path(__file__).parents[4] / "shared" / "data" / "pacs"))
FILE = FOLDER / "pacs-128px.parquet"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not FILE.is_file(), reason="no pacs-128px.parquet; name its folder in DWM_FAST_PACS"),
]


@pytest.fixture(scope="module")
def official() -> PacsData:
    return load_pacs(FILE, splits=FOLDER / "splits", image_size=32)


def test_all_images_load_and_the_official_lists_split_them(official: PacsData) -> None:
    for domain, images in official.domains.items():
        assert len(images.labels) == COUNTS[domain]
        assert len(images.test) == HELD_OUT[domain]
        everything = torch.cat([images.train, images.test]).sort().values
        assert torch.equal(everything, torch.arange(COUNTS[domain]))


def test_labels_agree_with_the_class_in_the_name(official: PacsData) -> None:
    for images in official.domains.values():
        for label, name in zip(images.labels.tolist(), images.names, strict=True):
            assert name.split("/")[1] == official.classes[label]


def test_sketches_are_grey_and_photos_are_not(official: PacsData) -> None:
    spread = {d: (s.images.amax(1) - s.images.amin(1)).float().mean().item() for d, s in official.domains.items()}
    assert spread["sketch"] < 1 < 20 < spread["photo"]


def test_own_holdout_takes_a_tenth_of_each_class() -> None:
    photo = load_pacs(FILE, image_size=16, domains=["photo"]).domains["photo"]
    per_class = torch.bincount(photo.labels).float()
    held = torch.bincount(photo.labels[photo.test]).float()
    assert torch.all((held / per_class - 0.1).abs() < 0.5 / per_class + 1e-6)
