"""The comparison of formats on a tiny network: its rows, its files, the same numbers again, and what was recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dwm_fast.language.formats import FORMATS, NOISE, FormatStudy, compare, differences, table
from dwm_fast.language.study import LanguageStudy

DOCS = Path(__file__).parents[2] / "docs"
TINY = LanguageStudy(width=16, layers=1, heads=2, hidden=16, length=24, rows=4, steps=10, mask_steps=16, pieces=4)
NAMES = [*map(", ".join, FORMATS), NOISE]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    said = []
    return folder, compare(FormatStudy(TINY, seeds=2, lr=1.0), folder, said.append), said


def test_every_format_has_a_perplexity_at_the_density_that_was_asked_for(results):
    _, found, said = results
    assert [row["seed"] for row in found["rows"]] == [0, 1]
    assert len(said) == 2 * len(NAMES)
    for row in found["rows"]:
        assert list(row["density"]) == NAMES
        assert all(math.isfinite(row[name]) for name in NAMES)
        # 16-bit logits that are equal fall together
        assert all(abs(density - 0.5) <= 0.005 for density in row["density"].values())
    assert all(any(differences(found["rows"], name)) for name in NAMES[1:])  # each is a run of its own


def test_the_folder_holds_results_and_table(results):
    folder, found, _ = results
    assert json.loads((folder / "formats.json").read_text()) == json.loads(json.dumps(found))
    assert (folder / "formats.md").read_text() == table(found["rows"])


def test_the_same_seeds_give_the_same_numbers(results, tmp_path):
    _, found, _ = results
    assert compare(FormatStudy(TINY, seeds=2, lr=1.0), tmp_path, lambda _: None)["rows"] == found["rows"]


def test_the_page_says_what_was_recorded_and_fewer_bits_change_no_more_than_other_noise_does():
    rows = json.loads((DOCS / "results/language-formats.json").read_text(encoding="utf-8"))["rows"]
    assert table(rows) in (DOCS / "language.md").read_text(encoding="utf-8")
    assert len(rows) == 3
    # Root mean square of what another draw changes, over the seeds; a mean of three pairs spreads by it / sqrt(3).
    noise = math.sqrt(sum(d * d for d in differences(rows, NOISE)) / len(rows))
    for name in NAMES[1:-1]:
        mean = sum(differences(rows, name)) / len(rows)
        assert abs(mean) <= 2 * noise / math.sqrt(len(rows))
