"""The page of recorded runs says what the recorded results say, and names no folder of the machine that ran them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dwm_fast._bench.dev import record
from tests.pacs.results_for_tests import results, two_seeds
from tests.pacs.sequence_results_for_tests import results as sequence_results

ROOT = Path(__file__).resolve().parents[2] / "docs" / "results"
RUNS = sorted(path.parent.name for path in ROOT.glob("*/results.json"))


def test_the_page_is_what_the_recorded_results_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert record.page(text, ROOT) == text, "run python -m benchmarks.dev.record"


NO_SEQUENCE = ("leap", "maskllm", "lottery", "own")
"""Pages without a method of sequences: tests/language holds the first two to the study of language models."""
PAGES = [path for path in sorted((ROOT.parent / "methods").glob("*.md")) if path.stem not in NO_SEQUENCE]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_page_of_a_method_says_what_the_recorded_sequences_gave(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert record.method_page(text, record.runs_in(ROOT)) == text, "run python -m benchmarks.dev.record"
    assert "<!-- generated: found " in text


def test_a_methods_page_has_a_line_for_each_of_its_views_beside_plain_fine_tuning() -> None:
    page = "a\n<!-- generated: found binary -->\nold\n<!-- end generated -->\nb\n"
    given = sequence_results()
    text = record.method_page(page, {"long": given, "pair": made()})
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == 2
    assert lines[0].startswith("- [long](../results/README.md#long)")
    assert "view masked" in lines[1] or "view masked" in lines[0]
    assert "plain fine-tuning" in lines[0]
    assert "old" not in text
    assert text.endswith("<!-- end generated -->\nb\n")
    nothing = record.method_page(page, {"pair": made()})
    assert "In no recorded sequence yet." in nothing


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_has_its_configuration_its_commit_and_no_folder_of_a_machine(name: str) -> None:
    kept = json.loads((ROOT / name / "results.json").read_text(encoding="utf-8"))
    assert json.loads((ROOT / name / "config.json").read_text(encoding="utf-8")) == kept["config"]
    assert len(kept["versions"]["commit"]) >= 7
    assert not [value for value in kept["config"].values() if isinstance(value, str) and "/" in value]


def made() -> dict[str, Any]:
    """Results of a small study, made on a machine with folders."""
    given = results(two_seeds(), real=True)
    paths = {"data": "/somewhere/images.parquet", "splits": "/somewhere/lists", "image_size": 32, "train_size": 32}
    return {**given, "config": {**given["config"], **paths}, "versions": {**given["versions"], "python": "3.11"}}


def test_taking_a_run_in_keeps_every_figure_and_drops_folders() -> None:
    given = made()
    kept = record.taken(given, "abcdef1")
    assert (kept["config"]["data"], kept["config"]["splits"]) == ("images.parquet", "lists")
    assert kept["rows"] == given["rows"]
    assert kept["versions"]["commit"] == "abcdef1"
    assert given["config"]["data"] == "/somewhere/images.parquet"


def test_a_section_shows_the_tables_of_its_run() -> None:
    kept = record.taken(made(), "abcdef1")
    text = record.section("pair", kept)
    assert text.startswith("## pair\n")
    assert record.tables(kept).strip() in text
    assert "abcdef1" in text
