"""Stages are kept as they are, and never with a number that is not finite."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dwm_fast.errors import InputError
from dwm_fast.pacs.pairs.lab import PairLab, Run
from dwm_fast.pacs.stages import StageFolder
from dwm_fast.pacs.study import Study

from .study_for_tests import config, tiny, tiny_data

BAD = [float("nan"), float("inf"), float("-inf")]
SETTINGS = {"lr": 0.1}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(BAD), st.lists(st.sampled_from(["loss", "rows", "history"]), min_size=1, max_size=3))
def test_a_figure_that_is_not_finite_is_named_wherever_it_lies_and_nothing_is_kept(
    tmp_path: Path, bad: float, where: list[str]
) -> None:
    figures: Any = bad
    for depth, key in enumerate(reversed(where)):
        figures = {key: [1.0, figures] if depth % 2 else figures}
    stages = StageFolder(tmp_path)
    with pytest.raises(InputError, match=r"stage a: .*is not finite.*lower its rate") as caught:
        stages.write("a", {}, {"accuracy": 0.5, **figures}, SETTINGS, time.perf_counter())
    assert ".".join(where) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stages.read("a", SETTINGS) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", BAD)
def test_a_tensor_that_is_not_finite_is_named_and_not_kept(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.ones(3, dtype=dtype)
    weight[1] = bad
    tensors = {"end/count": torch.tensor(3), "end/conv1.weight": weight}
    with pytest.raises(InputError, match=r"tensor end/conv1\.weight is not finite"):
        StageFolder(tmp_path).write("a", tensors, {"accuracy": 0.5}, SETTINGS, time.perf_counter())
    assert list(tmp_path.iterdir()) == []


def test_a_stage_with_nan_from_an_earlier_release_counts_as_not_done(tmp_path: Path) -> None:
    stages = StageFolder(tmp_path)
    header = {"figures": '{"loss": NaN}', "settings": json.dumps(SETTINGS)}
    save_file({"a": torch.ones(1)}, stages.path("a"), metadata=header)
    assert stages.read("a", SETTINGS) is None
    assert not stages.check("a", SETTINGS)


def test_a_study_that_diverges_stops_with_one_line_and_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    wild = config(sources=["photo"], targets=["sketch"], methods=["none"], tune={"none": {"lr": 1e30}})
    study = Study(wild, tmp_path, tiny_data())
    with pytest.raises(InputError, match=r"stage tune-photo-sketch-none.* is not finite.*--tune-lr") as caught:
        study.run()
    assert "\n" not in str(caught.value)
    assert [file.stem for file in (tmp_path / "stages").iterdir()] == ["source-photo-seed0"]
    assert not (tmp_path / "results.json").exists()
    calm = config(sources=["photo"], targets=["sketch"], methods=["none"])
    lab = PairLab(calm, tiny_data(), tmp_path, torch.device("cpu"))
    assert len(lab.rows(Run("photo", "sketch", "none", "-", 0))) == 1  # goes on from the source that was kept


def test_results_are_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    study = Study(config(), tmp_path, tiny_data())
    with pytest.raises(ValueError, match="not JSON compliant"):
        study.write({"sources": [], "rows": [{"loss": float("nan")}]})


@pytest.mark.parametrize(
    "entries",
    [
        {"source": {"lr": "inf"}},
        {"source": {"weight_decay": float("inf")}},
        {"binary": {"source_budget": float("inf")}},
        {"edit": {"clip_norm": float("inf")}},
        {"tune": {"none": {"lr": 1e400}}},
        {"logit_init": float("inf")},
        {"tau": float("inf")},
        {"deviations": float("nan")},
        {"edit_threshold": "inf"},
    ],
)
def test_an_option_that_is_not_finite_is_refused_in_one_line(entries: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(is |=)'?(inf|nan)'?; expected") as caught:
        config(**entries)
    assert "\n" not in str(caught.value)
