"""A sequence of two domains on a few images of the real PACS, from the given weights."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from dwm_fast.methods import TrainOptions
from dwm_fast.pacs.config import from_dict, real_defaults
from dwm_fast.pacs.data import PacsData
from dwm_fast.pacs.sequence import SequenceStudy

from ..pairs.test_study_real import pytestmark, subset  # noqa: F401
from ..sequence_for_tests import draw_nothing
from ..test_backbones import PARTIAL


def test_photo_then_sketch_runs_from_the_given_weights(
    subset: PacsData,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dwm_fast.pacs.study.prepared", contextlib.nullcontext)
    draw_nothing(monkeypatch)
    published = {"piggyback": {"options": {"batch_norm": "frozen"}}}
    asked = {"data": "PACS", "sequence": "photo,sketch", "methods": "none,piggyback", "sequential": published}
    config = dataclasses.replace(
        from_dict(asked, real_defaults()).with_task_epochs(1),
        weights=str(PARTIAL),
        image_size=32,
        train_size=32,
        batch_size=16,
        device="cpu",
        source=TrainOptions(epochs=4, lr=1e-3),
    )
    results = SequenceStudy(config, tmp_path, subset).run()
    (trained,) = results["sources"]
    plain, piggyback = results["measures"]
    assert piggyback["final"]["photo"] == trained["accuracy"] > 1.5 / 7, "better than guessing, and nothing forgotten"
    assert (piggyback["forgetting"], piggyback["backward_transfer"]) == (0, 0)
    assert piggyback["bits_added"] == 11_166_912  # a bit for every weight of ResNet-18's convolutions
    assert plain["forgetting"] == trained["accuracy"] - plain["final"]["photo"]
    assert "PACS" in (tmp_path / "table.md").read_text()
