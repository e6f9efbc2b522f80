"""Single stages: seeds by name, batches that never show a test image, counts of what is evaluated."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from dwm_fast.methods import BATCH_NORM_POLICIES
from dwm_fast.pacs.lab import stage_seed
from dwm_fast.pacs.pairs.lab import PairLab as Lab
from dwm_fast.pacs.pairs.lab import Run

from .study_for_tests import config, tiny, tiny_data


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    tiny(monkeypatch)
    return Lab(config(), tiny_data(), tmp_path, torch.device("cpu"))


def test_stage_seeds_are_those_of_every_machine() -> None:
    assert stage_seed("source-photo-seed0") == 8275171270065259394
    assert stage_seed("a", 1) == stage_seed("a/1") != stage_seed("a", 2)
    assert 0 <= min(stage_seed(i) for i in range(100)) <= max(stage_seed(i) for i in range(100)) < 2**63


def test_a_stage_depends_on_what_a_weights_file_holds_not_on_where_it_lies(lab: Lab, tmp_path: Path) -> None:
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)

    def settings(weights: str | None) -> object:
        changed = dataclasses.replace(config(), weights=weights)
        return Lab(changed, tiny_data(), tmp_path, torch.device("cpu")).source_stage("photo", 0)[1]["weights"]

    first = settings(str(tmp_path / "a.pth"))
    assert first == "sha256 7692c3ad3540bb80"  # sha256sum of "one"
    assert settings(str(tmp_path / "b.pth")) == first
    assert settings(str(tmp_path / "c.pth")) != first
    assert settings("torchvision") == "torchvision"
    assert settings(str(tmp_path / "missing.pth")) == str(tmp_path / "missing.pth")
    assert settings(None) is None


def test_batches_are_those_of_their_key_and_epoch(lab: Lab) -> None:
    def drawn(key: int, epoch: int) -> torch.Tensor:
        return torch.cat([images for images, _ in lab.batches("photo", key)(epoch)])

    assert torch.equal(drawn(1, 0), drawn(1, 0))
    assert not torch.equal(drawn(1, 0), drawn(1, 1))
    assert not torch.equal(drawn(1, 0), drawn(2, 0))
    assert drawn(1, 0).shape == (lab.steps("photo") * 16, 3, 16, 16)


def test_fine_tuning_has_crops_of_its_own(tmp_path: Path) -> None:
    def sizes(**changes: object) -> list[tuple[int, ...]]:
        mine = Lab(dataclasses.replace(config(), train_size=8, **changes), tiny_data(), tmp_path, torch.device("cpu"))
        return [next(mine.batches("photo", 1, tuning=tuning)(0))[0].shape[2:] for tuning in (False, True)]

    assert sizes() == [(8, 8), (16, 16)]  # the images' side by default
    assert sizes(tune_size=12) == [(8, 8), (12, 12)]


def test_training_never_sees_a_test_image(tmp_path: Path, lab: Lab) -> None:
    lab = Lab(lab.config, copy.deepcopy(lab.data), tmp_path, lab.device)
    images = lab.data.domains["photo"]
    images.images[images.test] = 255  # white: normalised channels far above those of the others
    images.images[images.train] = 0
    assert all(batch.max() < 0 for batch, _ in lab.batches("photo", 0)(0))


def test_evaluation_counts_the_test_images(lab: Lab) -> None:
    images = lab.data.domains["photo"]
    answers = iter(images.labels[images.test].split(128))

    class Knows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 20.0 * nn.functional.one_hot(next(answers), 7).float()

    accuracy, loss = lab.evaluate(Knows(), "photo")
    assert accuracy == 1.0
    assert loss == pytest.approx(0.0, abs=1e-6)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    for parameter in wrong.parameters():
        nn.init.zeros_(parameter)
    accuracy, loss = lab.evaluate(wrong, "photo")  # always class 0
    assert accuracy == pytest.approx(1 / 7)
    assert loss == pytest.approx(torch.tensor(7.0).log().item())


def test_source_network_starts_where_it_says_and_learns(lab: Lab) -> None:
    source = lab.source("photo", 0)
    assert set(source.start) == set(source.end) == set(lab.network().state_dict())
    assert not torch.equal(source.start["conv1.weight"], source.end["conv1.weight"])
    model = lab.network(source.end)
    assert lab.evaluate(model, "photo") == (source.figures["accuracy"], pytest.approx(source.figures["loss"]))


def test_all_sources_of_a_seed_start_from_one_network(lab: Lab) -> None:
    one, other = lab.source("photo", 0), lab.source("sketch", 0)
    assert all(torch.equal(value, other.start[name]) for name, value in one.start.items())


def test_a_mask_read_again_is_the_mask_found(lab: Lab) -> None:
    first, again = lab.mask("photo", "binary", 0), lab.mask("photo", "binary", 0)
    assert first.figures == again.figures
    assert first.found.keep is not None
    assert again.found.keep is not None
    assert all(torch.equal(mask, again.found.keep[name]) for name, mask in first.found.keep.items())


def test_ways_of_a_method_give_a_row_each_and_view(lab: Lab, tmp_path: Path) -> None:
    ways = [{"batch_norm": policy, "lr": 0.01} for policy in BATCH_NORM_POLICIES]
    many = Lab(config(tune={"naive": ways, "none": ways}), tiny_data(), tmp_path, lab.device)
    rows = many.rows(Run("photo", "sketch", "naive", "S_end", 0))
    assert [(r["bn_policy"], r["view"]) for r in rows] == [
        (p, v) for p in BATCH_NORM_POLICIES for v in ("shared", "masked")
    ]
    masked = {r["source_after"] for r in rows if r["view"] == "masked"}
    assert masked == {many.mask("photo", "naive", 0).figures["masked_accuracy"]}
    assert len(many.rows(Run("photo", "sketch", "none", "-", 0))) == 3


def test_any_torchvision_classifier_runs_through_every_stage(tmp_path: Path) -> None:
    changes = {
        "backbone": "shufflenet_v2_x0_5",
        "source": {"epochs": 1},
        "tune": {m: {"batch_norm": "frozen"} for m in ("none", "binary")},
    }
    other = Lab(config(**changes), tiny_data(), tmp_path, torch.device("cpu"))
    (row,) = other.rows(Run("photo", "sketch", "none", "-", 0))
    assert 0 <= row["target_after"] <= 1
    _, masked = other.rows(Run("photo", "sketch", "naive", "random", 0))
    assert masked["source_after"] == other.mask("photo", "naive", 0).figures["masked_accuracy"]
    assert other.mask("photo", "naive", 0).figures["total"] > 0
