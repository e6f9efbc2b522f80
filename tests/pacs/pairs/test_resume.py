"""A study that is killed and started again ends as one that was never killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.pacs.pairs.lab import PairLab as Lab
from dwm_fast.pacs.pairs.lab import Run
from dwm_fast.pacs.study import Study

from ..killing import Runner
from ..study_for_tests import CONFIG, config, stages, tiny, tiny_data, without_seconds

SOURCE, MASK = "source-photo-seed0", "mask-binary-photo-seed0"
PLAIN = "tune-photo-sketch-none---per-domain-lr0.01-seed0"
TUNED = "tune-photo-sketch-binary-S_start-per-domain-lr0.01-seed0"


def test_killed_in_every_kind_of_stage_it_ends_with_the_same_results(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = [
        (".locks/study.json", []),
        (f"stages/{SOURCE}.safetensors", [SOURCE]),
        (f"stages/{MASK}.safetensors", [MASK, SOURCE]),
        (f"stages/{PLAIN}.safetensors", [MASK, SOURCE, PLAIN]),
        ("results.json", [MASK, SOURCE, TUNED, PLAIN]),
    ]
    run = Runner("tests.pacs.study_for_tests")
    try:
        assert run(whole) == 0
        for file, done in kills:
            assert run(killed, kill_after=file) == signal.SIGKILL
            assert stages(killed) == sorted(done)
        assert not (killed / "report.html").exists()
        assert run(killed) == 0
    finally:
        run.close()

    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    assert without_seconds(results[0]) == without_seconds(results[1])
    for name in ("table.csv", "table.md", "config.json", f"masks/{MASK.removeprefix('mask-')}.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    files = [sorted(str(f.relative_to(d)) for d_ in [d] for f in d_.rglob("*") if f.is_file()) for d in (whole, killed)]
    assert [f for f in files[1] if not f.endswith(".part")] == files[0]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    tiny(monkeypatch)
    return make_lab(tmp_path)


def make_lab(folder: Path, **changes: Any) -> Lab:
    return Lab(config(**changes), tiny_data(), folder, torch.device("cpu"))


def broken(content: bytes) -> dict[str, bytes]:
    header = int.from_bytes(content[:8], "little")
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "header cut": content[:20],
        "one byte short": content[:-1],
        "no safetensors": b"\xff" * 200,
        "no figures": content[:8] + content[8 : 8 + header].replace(b'"figures"', b'"fogures"') + content[8 + header :],
        "figures no JSON": content[:8]
        + content[8 : 8 + header].replace(b'"figures":"{', b'"figures":"!')
        + content[8 + header :],
    }


def test_a_broken_stage_file_is_done_again(lab: Lab, tmp_path: Path) -> None:
    first = lab.mask("photo", "naive", 0)
    path = lab.stages.path("mask-naive-photo-seed0")
    good = path.read_bytes()
    for kind, content in broken(good).items():
        path.write_bytes(content)
        again = make_lab(tmp_path).mask("photo", "naive", 0)
        assert without_seconds(again.figures) == without_seconds(first.figures), kind
        assert len(path.read_bytes()) == pytest.approx(len(good), abs=10), kind


def test_a_finished_stage_is_read_and_not_done_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lab.source("photo", 0)
    monkeypatch.setattr("dwm_fast.pacs.lab.train", None)
    again = make_lab(tmp_path).source("photo", 0)
    assert again.figures == first.figures
    assert all(torch.equal(value, first.end[name]) for name, value in again.end.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 8}, "batch_size: 16 there, 8 now"),
        ({"source": {"lr": 0.02}}, "training.lr: 0.01 there, 0.02 now"),
        ({"crop_scale": 0.6}, "crop_scale: 0.7 there, 0.6 now"),
    ],
)
def test_other_settings_are_refused_before_anything_is_done_or_written(
    lab: Lab, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    lab.source("sketch", 0)
    before = sorted(tmp_path.rglob("*"))
    expected = f"source-sketch-seed0.* was made with other settings .{named}.*--out"
    with pytest.raises(InputError, match=expected) as caught:
        Study(config(**changes), tmp_path, tiny_data())
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert stages(tmp_path) == ["source-sketch-seed0"]


def test_other_mask_and_tuning_settings_name_their_stage(lab: Lab, tmp_path: Path) -> None:
    lab.rows(Run("photo", "sketch", "naive", "S_start", 0))
    with pytest.raises(InputError, match=r"mask-naive-photo.*naive.deviations: 1.0 there, 2.0 now"):
        Study(config(deviations=2.0), tmp_path, tiny_data())
    with pytest.raises(InputError, match=r"tune-photo-sketch-naive.*fine-tuning.epochs: 1 there, 3 now"):
        Study(config(tune={"naive": {"epochs": 3}}), tmp_path, tiny_data())
    Study(config(tune={"naive": {"lr": 0.5}}, edit={"lr": 0.9}, tau=2.0), tmp_path, tiny_data())  # of other stages


def test_other_images_are_refused(lab: Lab, tmp_path: Path) -> None:
    from dwm_fast.pacs.procedural import procedural

    lab.source("photo", 0)
    with pytest.raises(InputError, match="source_data"):
        Study(CONFIG, tmp_path, procedural(16, 5, 2, seed=1))


def test_a_larger_grid_uses_the_stages_that_are_there(lab: Lab, tmp_path: Path) -> None:
    lab.rows(Run("photo", "sketch", "naive", "S_start", 0))
    times = {name: lab.stages.path(name).stat().st_mtime_ns for name in stages(tmp_path)}
    assert len(times) == 3
    larger = make_lab(tmp_path, inits=["S_start", "random"], targets=["sketch", "art"], seeds=[0, 1])
    larger.rows(Run("photo", "sketch", "naive", "random", 0))
    larger.rows(Run("photo", "art", "none", "-", 0))
    assert {name: lab.stages.path(name).stat().st_mtime_ns for name in times} == times
    assert len(stages(tmp_path)) == 5
