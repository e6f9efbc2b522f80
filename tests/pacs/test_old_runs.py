"""A run folder that an earlier release wrote is read as it is: same stages, same results, nothing done again."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwm_fast.pacs.config import builtin_defaults, load_config
from dwm_fast.pacs.data import CLASSES, DomainSet, PacsData, fingerprint
from dwm_fast.pacs.sequence.table import LATER_METRICS
from dwm_fast.pacs.study import LATER_WORDS, Study

OLD = Path(__file__).parent / "old_runs"
"""Folders as commit f17b24a left them, without figures and pages: images by formula, the network of `TwoLayers`."""


class TwoLayers(nn.Module):
    """The network of the old runs: few weights, so that their files are small."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.bn1(self.conv1(x)).relu()).mean((2, 3)))  # type: ignore[no-any-return]


def images_by_formula() -> PacsData:
    """The images of the old runs, whole numbers on every machine: 21 to train and 14 to test in each domain."""
    sets = {}
    number, side = torch.arange(35), torch.arange(16)
    for domain, factor in zip(("photo", "art", "cartoon", "sketch"), (5, 8, 11, 14), strict=True):
        rows, columns = side.view(1, 1, 16, 1) * factor, side.view(1, 1, 1, 16) * 11
        pixels = (number.view(-1, 1, 1, 1) * 37 + torch.arange(3).view(1, 3, 1, 1) * 61 + rows + columns) % 256
        names = [f"{domain}/{i}" for i in range(35)]
        sets[domain] = DomainSet(pixels.to(torch.uint8), number % 7, number[:21].clone(), number[21:].clone(), names)
    return PacsData("images by formula", False, sets, CLASSES, 16, fingerprint(sets))


@pytest.fixture(params=["pairs", "sequence"])
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an old run folder, in a process that can train nothing."""
    monkeypatch.setattr("dwm_fast.pacs.backbones.SmallResNet", TwoLayers)
    monkeypatch.setattr("dwm_fast.pacs.study.prepared", contextlib.nullcontext)
    for draw in ("pairs.figures", "sequence.figures"):
        monkeypatch.setattr(f"dwm_fast.pacs.{draw}.draw_all", lambda results: {})
    for step in ("lab.train", "pairs.lab.train", "sequence.lab.SequenceLab._learn", "pairs.lab.PairLab._find_mask"):
        monkeypatch.setattr(f"dwm_fast.pacs.{step}", None)
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def without_machine(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "versions"}


def without_later(results: dict[str, Any]) -> dict[str, Any]:
    """Without the measures and the words on the images that came after the old runs."""
    data = {key: value for key, value in results["data"].items() if key not in LATER_WORDS}
    results = {**results, "data": data}
    plain = [{k: v for k, v in one.items() if k not in LATER_METRICS} for one in results.get("measures", [])]
    return {**results, "measures": plain} if plain else results


def test_an_old_run_is_read_to_its_results_and_left_as_it_is(old: Path) -> None:
    results = json.loads((old / "results.json").read_text())
    stages = {file.name: file.read_bytes() for file in (old / "stages").iterdir()}
    config = load_config(old / "config.json", builtin_defaults())
    again = Study(config, old, images_by_formula()).run()
    assert without_later(without_machine(again)) == without_machine(results)
    assert {file.name: file.read_bytes() for file in (old / "stages").iterdir()} == stages
    assert (old / "report.html").exists()
    assert json.loads((old / "config.json").read_text()) == results["config"]


def test_a_broken_stage_of_an_old_run_is_done_again(old: Path) -> None:
    lost = sorted((old / "stages").glob("source-*"))[0]
    lost.write_bytes(b"")
    with pytest.raises(TypeError):  # it would be trained again, and here nothing can be
        Study(load_config(old / "config.json", builtin_defaults()), old, images_by_formula()).run()
