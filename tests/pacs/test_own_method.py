"""FGGM from a file outside the package, unedited: on the command line, in tables, in the report, for both studies."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from dwm_fast.cli import main
from dwm_fast.methods import load_method, registry
from dwm_fast.pacs.config import builtin_defaults, from_dict
from dwm_fast.pacs.pairs.study import PairStudy

from .sequence_for_tests import BASE
from .study_for_tests import CONFIG, stages, tiny, tiny_data

FGGM = f"{Path(__file__).parents[2] / 'examples' / 'fggm.py'}:FGGM"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    load_method.cache_clear()
    for draw in ("pairs.figures", "sequence.figures"):
        monkeypatch.setattr(f"dwm_fast.pacs.{draw}.draw_all", lambda results: {})


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dwm-fast", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)


def test_a_sequence_runs_it_to_table_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwm_fast.pacs.config.builtin_defaults", lambda: BASE)
    ask(
        monkeypatch, "pacs", "sequence", "photo,sketch", "--methods", f"none,{FGGM}", "--task-epochs", "1", "--out", "a"
    )
    results = json.loads(Path("a/results.json").read_text())
    assert results["config"]["methods"] == ["none", "fggm-own"]
    assert results["config"]["own_methods"] == [FGGM]
    assert results["methods"]["fggm-own"]["options"]["epochs"] == 1
    frozen = [task["figures"]["fraction_frozen"] for task in results["tasks"] if task["figures"].get("fraction_frozen")]
    assert frozen == [pytest.approx(0.7, abs=0.06)]  # whole rows of layers as narrow as 8
    assert "| fggm-own | shared |" in Path("a/table.md").read_text()
    assert "fggm-own" in Path("a/report.html").read_text()
    registry._registered.clear()  # as in another process
    load_method.cache_clear()
    ask(monkeypatch, "pacs", "--config", "a/config.json", "--out", "a")
    assert json.loads(Path("a/results.json").read_text())["rows"] == results["rows"]


def test_pairs_run_it_once_for_every_target_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwm_fast.pacs.config.builtin_defaults", lambda: CONFIG)
    asked = ("--sources", "photo", "--targets", "sketch,art", "--methods", f"none,naive,{FGGM}", "--out", "b")
    ask(monkeypatch, "pacs", *asked, "--tune-lr", "fggm-own=0.01")
    results = json.loads(Path("b/results.json").read_text())
    own = [mask for mask in results["masks"] if mask["method"] == "fggm-own"]
    assert [(mask["source"], mask["target"]) for mask in own] == [("photo", "sketch"), ("photo", "art")]
    assert [mask["method"] for mask in results["masks"] if "target" not in mask] == ["naive"]
    assert {f"mask-fggm-own-photo-{target}-seed0" for target in ("sketch", "art")} <= set(stages(Path("b")))
    assert {Path(f"b/masks/fggm-own-photo-{target}-seed0.safetensors").exists() for target in ("sketch", "art")} == {
        True
    }
    rows = [row for row in results["rows"] if row["method"] == "fggm-own"]
    assert {(row["target"], row["view"], row["lr"]) for row in rows} == {
        (target, view, 0.01) for target in ("sketch", "art") for view in ("shared", "masked")
    }
    assert "fggm-own" in Path("b/table.md").read_text()
    assert "fggm-own" in Path("b/report.html").read_text()


def test_a_pair_s_mask_depends_on_the_target_it_sees(tmp_path: Path) -> None:
    config = from_dict({"methods": ["none", FGGM], "pairwise": {"fggm-own": {"quantile": 0.5}}}, CONFIG)
    assert config.pair_method("fggm-own").quantile == 0.5  # type: ignore[attr-defined]
    lab = PairStudy(config, tmp_path / "c", tiny_data()).lab
    masks = [lab.mask("photo", "fggm-own", 0, target).found.keep for target in ("sketch", "art", "sketch")]
    first, other, again = (torch.cat([mask.flatten() for mask in (keep or {}).values()]) for keep in masks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_options_of_a_method_are_read_as_those_of_the_library(tmp_path: Path) -> None:
    base = builtin_defaults()
    config = from_dict({"methods": f"none,{FGGM}", "pairwise": {"fggm-own": {"quantile": "0.5"}}}, base)
    assert from_dict(json.loads(json.dumps(config.to_dict())), base) == config
    assert config.ways("fggm-own") == config.tune["binary"]
    with pytest.raises(
        ValueError, match="pairwise: unknown method 'ksm'; expected some of fggm, lottery-ticket, low-rank, fggm-own"
    ):
        from_dict({"pairwise": {"ksm": {}}}, base)


def test_the_library_s_other_methods_of_pairs_run_by_name(tmp_path: Path) -> None:
    entries = {"pairwise": {"lottery-ticket": {"rounds": 2, "options": {"epochs": 1}}, "fggm": {"images": 4}}}
    config = from_dict({"methods": "none,fggm,lottery-ticket", "sources": "photo", **entries}, CONFIG)
    results = PairStudy(config, tmp_path / "d", tiny_data()).run()
    kept = {mask["method"]: mask["fraction_kept"] for mask in results["masks"]}
    assert kept == {"fggm": pytest.approx(0.7, abs=0.06), "lottery-ticket": pytest.approx(0.64, abs=0.01)}


@pytest.mark.parametrize("values", ["near", "random"])
def test_the_recorded_search_s_own_method_refills_what_its_masks_drop(tmp_path: Path, values: str) -> None:
    file = Path(__file__).parents[2] / "docs/results/refill.py"
    options = {"options": {"epochs": 1, "coefficient": 0.01, "source_budget": 0.5}, "values": values}
    config = from_dict({"methods": f"none,{file}:Refill", "pairwise": {"refill": options}}, CONFIG)
    lab = PairStudy(config, tmp_path / "e", tiny_data()).lab
    mask = lab.mask("photo", "refill", 0)
    assert len(mask.found.history) == 1
    kind = sys.modules[type(lab.method("refill")).__module__].Refilled(values=values)
    weight, state = torch.linspace(-1, 1, 100).view(10, 10), torch.tensor([3, 0])
    for logit, training in itertools.product((-99.0, 99.0), (True, False)):
        logits = torch.full_like(weight, logit)
        first, again = (kind.draw([logits], [weight], state, torch.tensor(1.0), training=training)[0] for _ in "ab")
        assert torch.equal(first[0], again[0])
        # (w - r) + r is w to two roundings of numbers below 8, eps 2^-24 each
        assert torch.allclose(first[0], weight, rtol=0, atol=8 * 2**-23) == (logit > 0)
        assert (first[0] != 0).all()
