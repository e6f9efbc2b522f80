"""The table says what the runs say: hand-computed means and spreads, and how many runs stand behind each."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
from rich.console import Console

from dwm_fast.pacs.pairs.table import paper_table, rows_csv, to_csv, to_markdown, to_rich

from ..results_for_tests import STAND_IN, results, row, two_seeds


def find(rows, method, view="shared"):
    return next(one for one in rows if (one.method, one.view) == (method, view))


def test_mean_is_over_targets_and_seeds_and_spread_over_seed_means():
    cell = find(paper_table(results(two_seeds())), "binary").cells["photo"]
    assert cell.s_gain.mean == pytest.approx(0.20)  # of 0.10, 0.20, 0.20, 0.30
    assert cell.s_gain.spread == pytest.approx(math.sqrt(0.005))  # of the seeds' means 0.15 and 0.25
    assert cell.t_drop.mean == pytest.approx(-0.01)
    assert cell.t_drop.spread == pytest.approx(0.0)
    assert cell.source_before.mean == pytest.approx(0.95)
    assert cell.source_after.mean == pytest.approx(0.60)
    assert cell.target_after.mean == pytest.approx(0.89)
    assert cell.fraction_kept.mean == pytest.approx(0.25)
    assert (cell.pairs, cell.seeds, cell.runs) == (2, 2, 4)
    assert cell.coverage == "2 pairs × 2 seeds"


def test_one_seed_has_no_spread():
    rows = [one for one in two_seeds() if one["seed"] == 0]
    cell = find(paper_table(results(rows)), "binary").cells["photo"]
    assert cell.s_gain.mean == pytest.approx(0.15)
    assert cell.s_gain.spread is None


def test_seed_that_lacks_a_pair_counts_in_the_mean_but_not_in_the_spread():
    rows = [one for one in two_seeds() if (one["target"], one["seed"]) != ("sketch", 1)]
    cell = find(paper_table(results(rows)), "binary").cells["photo"]
    assert cell.s_gain.mean == pytest.approx(0.5 / 3)
    assert cell.s_gain.spread is None
    assert cell.coverage == "3 runs of 2 pairs × 2 seeds"


def test_rows_are_in_the_papers_order_and_overall_is_over_all_pairs():
    rows = [
        *two_seeds(),
        row("art", "photo", "binary", 0, 0.40, 0.0),
        row("art", "photo", "binary", 1, 0.60, 0.0),
    ]
    table = paper_table(results(rows))
    assert [(one.method, one.view) for one in table] == [
        ("none", "shared"),
        ("naive", "shared"),
        ("binary", "shared"),
        ("binary", "masked"),
    ]
    binary = find(table, "binary")
    assert binary.sources == ("photo", "art")
    assert list(binary.cells) == ["photo", "art"]
    assert binary.overall.s_gain.mean == pytest.approx(1.8 / 6)
    assert binary.overall.s_gain.spread == pytest.approx(abs(0.7 / 3 - 1.1 / 3) / math.sqrt(2))
    assert "art" not in find(table, "naive").cells


def test_batch_norm_policies_and_inits_do_not_mix():
    rows = [
        row("photo", "art", "binary", 0, 0.1, 0.0),
        row("photo", "art", "binary", 0, 0.3, 0.0, bn_policy="shared"),
        row("photo", "art", "binary", 0, 0.5, 0.0, init="random", lr=1e-3),
    ]
    table = paper_table(results(rows))
    assert [(one.init, one.bn_policy, one.lr) for one in table] == [
        ("S_start", "frozen", 3e-4),
        ("S_start", "shared", 3e-4),
        ("random", "frozen", 1e-3),
    ]
    assert [one.overall.s_gain.mean for one in table] == [0.1, 0.3, 0.5]


def test_rates_of_a_method_do_not_mix_and_only_the_first_of_none_is_the_baseline():
    rows = [
        row("photo", "art", "none", 0, 0.0, 0.0),
        row("photo", "art", "none", 0, 0.1, -0.2, lr=1e-4),
        row("photo", "art", "binary", 0, 0.3, 0.0),
    ]
    table = paper_table(results(rows))
    assert [(one.method, one.lr, one.baseline, one.ambiguous) for one in table] == [
        ("none", 3e-4, True, True),
        ("none", 1e-4, False, True),
        ("binary", 3e-4, False, False),
    ]
    text = to_markdown(table)
    assert "| none | - | frozen | shared | 0.0003 | 0.000 | baseline |" in text
    assert "| none | - | frozen | shared | 0.0001 | 0.000 | +0.100 / -0.200 |" in text
    assert "| none | - | frozen | shared | 0.0001 | 0.950 → 0.500 / 0.700 |" in text


def test_pulled_and_frozen_ways_do_not_mix_and_the_rate_says_which():
    rows = [
        row("photo", "art", "none", 0, 0.0, 0.0),
        row("photo", "art", "binary", 0, 0.1, -0.2),
        {**row("photo", "art", "binary", 0, 0.3, 0.0), "kept_decay": 100.0},
    ]
    table = paper_table(results(rows))
    assert [(one.method, one.rate, one.ambiguous) for one in table] == [
        ("none", "0.0003", False),
        ("binary", "0.0003", True),
        ("binary", "0.0003, pull 100", True),
    ]
    assert "| binary | S_start | frozen | shared | 0.0003, pull 100 |" in to_markdown(table)


@pytest.mark.parametrize("lost", [None, math.nan])
def test_missing_value_is_a_dash_and_never_nan(lost):
    rows = two_seeds()
    rows[0]["s_gain"] = lost
    table = paper_table(results(rows))
    assert find(table, "binary").cells["photo"].s_gain.mean is None
    text = to_markdown(table) + to_csv(table)
    assert "–" in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_markdown_names_the_data_and_says_what_a_cell_averages():
    text = to_markdown(paper_table(results(two_seeds())))
    assert STAND_IN in text
    assert "+0.200 ± 0.071 / -0.010 ± 0.000" in text
    assert "0.950 ± 0.000 → 0.600 ± 0.071 / 0.890 ± 0.000" in text
    assert "Each cell averages 2 pairs × 2 seeds" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {6 + 1 + 1, 5 + 1 + 1}  # six and five columns of names and one source


def test_markdown_of_an_uneven_grid_says_so_in_each_cell():
    text = to_markdown(paper_table(results([*two_seeds(), row("art", "photo", "none", 0, 0.0, 0.0)])))
    assert "uneven" in text
    assert "(2 pairs × 2 seeds)" in text
    assert "(1 pair × 1 seed)" in text


def test_csv_has_every_number_in_full():
    lines = list(csv.DictReader(io.StringIO(to_csv(paper_table(results(two_seeds()))))))
    line = next(one for one in lines if (one["method"], one["view"], one["source"]) == ("binary", "shared", "photo"))
    assert line["data"] == STAND_IN
    assert float(line["s_gain"]) == pytest.approx(0.2)
    assert float(line["s_gain_spread"]) == pytest.approx(math.sqrt(0.005))
    assert (line["pairs"], line["seeds"], line["runs"]) == ("2", "2", "4")
    assert {one["source"] for one in lines} == {"photo", "all"}


def test_raw_rows_are_written_one_line_each():
    rows = two_seeds()
    lines = list(csv.DictReader(io.StringIO(rows_csv(results(rows)))))
    assert len(lines) == len(rows)
    assert {line["data"] for line in lines} == {STAND_IN}
    assert [float(line["source_after"]) for line in lines] == [one["source_after"] for one in rows]


@pytest.mark.parametrize("uneven", [False, True])
def test_terminal_table_fits_in_80_columns_with_gain_and_drop_side_by_side(uneven):
    domains = ["photo", "art", "cartoon", "sketch"]
    rows = [
        row(source, target, method, seed, 0.1 * seed, -0.1 * seed, bn_policy="per-domain", view=view)
        for source in domains
        for target in domains
        if source != target
        for method, view in (("none", "shared"), ("binary", "shared"), ("binary", "masked"))
        for seed in (0, 1)
        if not (uneven and (source, target, seed) == ("art", "sketch", 1))
    ]
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(to_rich(paper_table(results(rows))))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert re.search(r"binary S_start .* \+0\.050±0\.071 +-0\.050±0\.071", text)
    assert ("5 of 3p×2s" in text) == uneven
    assert STAND_IN in " ".join(text.split())


def test_nothing_run_yet_is_said():
    assert paper_table(results([])) == []
    assert "No runs" in to_markdown([])
    assert to_rich([]).row_count == 0
