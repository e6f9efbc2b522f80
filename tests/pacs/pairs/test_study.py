"""The whole study in miniature: what it writes, that it is deterministic, what it says when it cannot run."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast import ops
from dwm_fast.bank import MaskFile
from dwm_fast.errors import DataError, InputError
from dwm_fast.pacs.config import METHODS, from_dict
from dwm_fast.pacs.pairs.lab import PairLab as Lab
from dwm_fast.pacs.pairs.lab import Run
from dwm_fast.pacs.study import Study, choose_device, prepared

from ..study_for_tests import CONFIG, config, stages, tiny, tiny_data, without_seconds

ROW = {
    "source",
    "target",
    "method",
    "init",
    "seed",
    "bn_policy",
    "lr",
    "view",
    "source_before",
    "source_after",
    "target_after",
    "fraction_kept",
    "s_gain",
    "t_drop",
    "seconds",
}
MACHINE = {"seconds", "device", "threads"}
MASK = {
    "source",
    "seed",
    "method",
    "kept",
    "total",
    "fraction_kept",
    "masked_accuracy",
    "source_accuracy",
    "within_budget",
    "coefficient",
    "layers",
    "history",
    *MACHINE,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any], list[Any]]:
    """A folder, its results, and what progress and steps were told; the settings of the process are left alone."""
    folder = tmp_path_factory.mktemp("study") / "runs" / "tiny"
    told: list[Any] = []
    steps: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch)
        results = Study(CONFIG, folder).run(lambda *args: told.append(args), steps.append)
    return folder, results, told, steps


def test_folder_holds_everything_it_is_for(finished: Any) -> None:
    folder = finished[0]
    for name in ("config.json", "results.json", "results.csv", "table.csv", "table.md", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    assert len(list((folder / "figures").glob("*.png"))) >= 4
    assert "<html" in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.part"))


def test_results_have_the_documented_entries(finished: Any) -> None:
    folder, results = finished[:2]
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["format"] == 1
    assert set(results) == {"format", "data", "config", "versions", "sources", "masks", "rows", "overlap"}
    data = results["data"]
    assert (data["name"], data["real"]) == ("procedural stand-in (not PACS)", False)
    assert (data["domains"], data["image_size"]) == (["photo", "art", "cartoon", "sketch"], 16)
    assert data["counts"]["photo"] == {"train": 35, "test": 14}
    assert len(data["classes"]) == 7
    assert set(results["versions"]) == {"dwm_fast", "torch", "torchvision", "python", "device"}
    assert from_dict(results["config"], CONFIG) == CONFIG
    assert [set(s) for s in results["sources"]] == [{"source", "seed", "accuracy", "loss", *MACHINE}] * 2
    assert [set(m) for m in results["masks"]] == [MASK] * 6
    assert all(set(row) == ROW for row in results["rows"])


def test_every_cell_of_the_grid_has_its_rows(finished: Any) -> None:
    rows = finished[1]["rows"]
    cells = [(r["source"], r["target"], r["method"], r["init"], r["view"]) for r in rows]
    pairs = [("photo", "sketch"), ("sketch", "photo")]
    expected = [(*p, "none", "-", "shared") for p in pairs]
    expected += [(*p, m, "S_start", v) for p in pairs for m in METHODS[1:] for v in ("shared", "masked")]
    assert sorted(cells) == sorted(expected)
    assert {(r["bn_policy"], r["lr"], r["seed"]) for r in rows} == {("per-domain", 0.01, 0)}


def test_gains_are_differences_to_plain_fine_tuning_of_the_same_pair(finished: Any) -> None:
    rows = finished[1]["rows"]
    for row in rows:
        (base,) = [r for r in rows if r["method"] == "none" and r["source"] == row["source"]]
        assert row["s_gain"] == row["source_after"] - base["source_after"]
        assert row["t_drop"] == row["target_after"] - base["target_after"]


def test_masked_view_is_the_masked_source_accuracy_to_the_last_image(finished: Any) -> None:
    _, results, _, _ = finished
    masks = {(m["source"], m["method"]): m["masked_accuracy"] for m in results["masks"]}
    views = [r for r in results["rows"] if r["view"] == "masked"]
    assert len(views) == 6
    assert all(r["source_after"] == masks[r["source"], r["method"]] for r in views)


def test_mask_files_hold_the_masks_that_were_counted(finished: Any) -> None:
    folder, results = finished[:2]
    assert len(list((folder / "masks").iterdir())) == 6
    for mask in results["masks"]:
        kept = MaskFile(folder / "masks" / f"{mask['method']}-{mask['source']}-seed0.safetensors").load()
        assert {name: (int(m.sum()), m.numel()) for name, m in kept.masks().items()} == {
            f"{layer['name']}.weight": (layer["kept"], layer["total"]) for layer in mask["layers"]
        }
        assert mask["kept"] == sum(layer["kept"] for layer in mask["layers"])
        assert mask["fraction_kept"] == mask["kept"] / mask["total"]
        assert 0.1 < mask["fraction_kept"] < 0.9
        assert (kept.info.domain, kept.info.method) == (mask["source"], mask["method"])


def test_overlap_is_the_jaccard_index_of_two_sources_masks(finished: Any) -> None:
    folder, results = finished[:2]
    assert len(results["overlap"]) == 3
    for entry in results["overlap"]:
        a, b = (
            torch.cat([m.flatten() for m in MaskFile(folder / "masks" / name).load().masks().values()])
            for name in (f"{entry['method']}-{entry[side]}-seed0.safetensors" for side in "ab")
        )
        assert entry["jaccard"] == pytest.approx(int((a & b).sum()) / int((a | b).sum()))


def test_csv_has_a_line_a_row(finished: Any) -> None:
    folder, results = finished[:2]
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"])
    assert float(lines[0]["source_after"]) == pytest.approx(results["rows"][0]["source_after"])


def test_progress_counts_up_to_the_number_of_stages(finished: Any) -> None:
    folder, _, told, steps = finished
    total = 2 * (1 + 3 + 4)
    assert [t[0] for t in told] == list(itertools.chain(*((i, i + 1) for i in range(total))))
    assert {t[1] for t in told} == {total}
    assert all((t[3] is None) == (i % 2 == 0) for i, t in enumerate(told))
    assert len(stages(folder)) == total
    per_epoch = 2  # 35 images, batches of 16, the last one dropped
    assert len(steps) == 2 * per_epoch * (2 + 2 + 4)  # source, two learned masks, four fine-tunings


def test_the_same_seed_gives_the_same_results(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    torch.manual_seed(12345)  # the state of the process does not enter
    again = Lab(CONFIG, tiny_data(), tmp_path, torch.device("cpu"))
    rows = without_seconds(again.rows(Run("photo", "sketch", "binary", "S_start", 0)))
    first = [r for r in finished[1]["rows"] if (r["source"], r["method"]) == ("photo", "binary")]
    assert rows == [{k: v for k, v in without_seconds(r).items() if k not in ("s_gain", "t_drop")} for r in first]
    there = Lab(CONFIG, tiny_data(), finished[0], torch.device("cpu")).source("photo", 0)
    assert all(torch.equal(value, there.end[name]) for name, value in again.source("photo", 0).end.items())


def test_another_seed_gives_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    lab = Lab(CONFIG, tiny_data(), tmp_path, torch.device("cpu"))
    one, other = lab.source("photo", 0), lab.source("photo", 1)
    assert not torch.equal(one.end["conv1.weight"], other.end["conv1.weight"])
    assert not torch.equal(one.start["conv1.weight"], other.start["conv1.weight"])


def test_only_plain_fine_tuning_has_no_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})
    alone = config(methods=["none"], sources=["photo"], targets=["sketch"])
    results = Study(alone, tmp_path).run()
    assert (len(results["rows"]), results["masks"], results["overlap"]) == (1, [], [])
    assert (tmp_path / "report.html").exists()


def test_a_study_leaves_the_settings_of_the_process_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwm_fast.pacs.study._keep_freed_memory", lambda: None)  # for good, in this process

    def flushing() -> bool:
        return sys.float_info.min / 2 == 0

    assert not flushing()
    with contextlib.suppress(KeyError), prepared(torch.device("cpu")):
        assert flushing()
        raise KeyError
    assert not flushing()
    before = torch.backends.cudnn.deterministic
    with prepared(torch.device("cuda")):
        assert torch.backends.cudnn.deterministic
        assert not flushing()
    assert torch.backends.cudnn.deterministic is before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write .*/file: .*choose another folder") as caught:
        Study(CONFIG, tmp_path / "file").run()
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_no_half_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    study = Study(CONFIG, tmp_path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"study.json: No space left on device; free the disk"):
        study.run()
    with pytest.raises(DataError, match=r"source-photo-seed0.safetensors: No space left on device; free the disk"):
        study.lab.source("photo", 0)
    assert list((tmp_path / "stages").iterdir()) == []


def test_a_device_that_is_not_there_is_named() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:99", "gpu"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here: .*--device cpu") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


def test_weights_are_reported_while_a_source_is_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    lab = Lab(CONFIG, tiny_data(), tmp_path, torch.device("cpu"))
    state = {k: v.contiguous() for k, v in lab.network().state_dict().items() if not k.startswith("fc")}
    torch.save(state, tmp_path / "part.pth")
    given = dataclasses.replace(CONFIG, weights=str(tmp_path / "part.pth"), sources=("photo",))
    study = Study(given, tmp_path / "run")
    report = study.weights_report()
    assert report is not None
    assert report.summary().endswith(" tensors; fresh: fc")
    source = study.lab.source("photo", 0)
    assert all(torch.equal(source.start[name], value) for name, value in state.items())
    assert study.weights_report() is None
    assert Study(CONFIG, tmp_path / "other").weights_report() is None


def test_dropout_draws_do_not_depend_on_what_ran_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)

    class Dropping(torch.nn.Sequential):
        def __init__(self, classes: int) -> None:
            super().__init__(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 16 * 16, classes))

    monkeypatch.setattr("dwm_fast.pacs.backbones.SmallResNet", Dropping)
    rows = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        lab = Lab(CONFIG, tiny_data(), folder, torch.device("cpu"))
        lab.mask("photo", "binary", 0)
        torch.rand(len(rows) + 1)
        lab.rows(Run("photo", "sketch", "none", "-", 0))
        torch.rand(len(rows) + 3)
        rows.append(without_seconds(lab.rows(Run("photo", "sketch", "binary", "S_start", 0))))
        rows[-1].append(ops.pack(list((lab.mask("photo", "binary", 0).found.keep or {}).values())).tolist())
    assert rows[0] == rows[1]
