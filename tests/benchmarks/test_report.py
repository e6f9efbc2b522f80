"""Tables and figures come from result files, and every generated number can be found there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dwm_fast._bench.dev import compare, figures, modelled, report
from dwm_fast._bench.results import Row
from dwm_fast._bench.table import console, results_table, shown_number, shown_rate
from tests.benchmarks.test_results import FACTS, ROW

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"<!-- generated: (?:results|summary) -->\n(.*?)<!-- end generated -->", re.DOTALL)
_CELL = re.compile(r"(?<![\w.-])\d[\d.]*+(?:e-?\d+)?(?=x\b|(?!\w))")  # a ratio whole: '77.7x' is 77.7


def _row(way: str, metric: str, unit: str, value: float, parameters: str = "M=16;backend=cpp") -> Row:
    return Row("linear from bits", way, metric, unit, value / 2, value, 2 * value, parameters, commit="abc", **FACTS)


ROWS = [
    _row("dense product", "time", "ms", 1.5, "M=16"),
    _row("dense product", "throughput", "TFLOP/s", 0.0421, "M=16"),
    _row("ours", "time", "ms", 3.25),
    _row("ours", "throughput", "TFLOP/s", 1.25),
    _row("ours", "bandwidth", "GB/s", 10.0),
    _row("ours", "speed-up over dense product", "x", 0.462),
]


def _published(rows: list[Row]) -> set[str]:
    """Every number that a table may show, as text, straight from the rows."""
    out: set[str] = set()
    for row in rows:
        scaled = {"size": row.p50 / 1e3}.get(row.metric, 1e3 * row.p50)
        for value in (row.p20, row.p50, row.p80, scaled):
            out |= {f"{value:.{d}f}" for d in range(6)} | {f"{value:.2e}"}
        out |= set(_CELL.findall(" ".join([row.case, row.way, row.metric, row.parameters.replace("=", " ")])))
        out |= set(_CELL.findall(" ".join([row.device, row.torch, row.triton, row.python, row.commit, row.date[:10]])))
        out |= set(row.date[:10].split("-"))
    return out


def test_every_number_in_the_generated_blocks_is_found_in_a_result_file() -> None:
    published = _published(report.recorded(ROOT))
    for page in report.PAGES:
        for block in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
            text = block.replace("..", " ").replace("=", " ")
            strange = [n for n in _CELL.findall(text) if n.rstrip(".") not in published]
            assert not strange, f"{page}: {strange[:5]} are in no result file; run python -m benchmarks.dev.report"


def test_the_pages_are_what_the_result_files_say() -> None:
    rows = report.recorded(ROOT)
    for page in report.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert report.filled(text, rows) == text, f"{page} is stale; run python -m benchmarks.dev.report"


def test_the_page_of_benchmarks_has_a_generated_block() -> None:
    assert _BLOCK.search((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"))


def test_a_block_is_replaced_and_the_rest_of_the_page_stays() -> None:
    page = "a\n<!-- generated: results -->\nold 7\n<!-- end generated -->\nb\n"
    text = report.filled(page, ROWS)
    assert text.startswith("a\n<!-- generated: results -->\n### chip\n")
    assert text.endswith("<!-- end generated -->\nb\n")
    assert "old" not in text
    assert "| ours (cpp) | 3.25 | 1.62..6.50 | 1.25 TFLOP/s |  |" in text
    assert "| dense product | 1.50 | 0.750..3.00 | 42.1 GFLOP/s | 0.462x |" in text
    assert report.filled(text, ROWS) == text


def test_the_summary_has_a_line_a_case_with_ours_over_the_limit_and_over_the_rivals() -> None:
    rival = [_row("eager", "time", "ms", 9.0, "M=16"), _row("ours", "speed-up over eager", "x", 2.77)]
    other = replace(ROWS[0], case="conv2d from bits")
    page = "<!-- generated: summary -->\nold\n<!-- end generated -->"
    text = report.filled(page, [*ROWS, *rival, other])
    assert "| linear from bits (M=16) | 3.25 ms | dense product: 0.462x | eager: 2.77x |" in text
    assert text.count("linear from bits") == 1
    assert "conv2d" not in text


def test_a_page_without_results_says_so() -> None:
    page = "<!-- generated: results -->\n<!-- end generated -->"
    assert "No results are recorded yet" in report.filled(page, [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.001234, "0.00123"), (1.0, "1.00"), (99.9, "99.9"), (123.4, "123"), (4.2e-5, "4.20e-05")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert shown_number(value) == text


def test_small_rates_are_shown_in_a_smaller_unit() -> None:
    assert shown_rate(ROWS[1]) == "42.1 GFLOP/s"
    assert shown_rate(ROWS[4]) == "10.0 GB/s"


def test_the_table_fits_100_columns() -> None:
    screen = console()
    long = replace(ROWS[2], way="ours, by a way whose name does not want to come to an end at all " * 2)
    with screen.capture() as captured:
        screen.print(results_table([*ROWS, long]))
    assert max(map(len, captured.get().splitlines())) <= 100


def test_the_short_table_has_a_line_per_case() -> None:
    assert report.short_lines(ROWS) == ["linear from bits [M=16]: 3.25 ms; over dense product 0.462x"]


def test_figures_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    more = [replace(ROWS[2], parameters=f"M={m};backend=cpp", p50=float(m)) for m in (1, 64)]
    drawn = {p.name for p in figures.draw_all([*ROWS, *more], tmp_path)}
    assert drawn == {"benchmarks-chip-bars.svg", "benchmarks-chip-linear-m.svg"}
    assert figures.bars(ROWS) == [("linear from bits (M=16)", "ours", 3.25 / 1.5)]


def test_a_comparison_calls_only_what_lies_beyond_both_spreads_a_change() -> None:
    def timed(way: str, p20: float, p50: float, p80: float) -> Row:
        return replace(ROW, way=way, p20=p20, p50=p50, p80=p80)

    base = [timed("a", 9, 10, 11), timed("b", 9, 10, 11), timed("c", 9.9, 10, 10.1), timed("gone", 1, 1, 1)]
    new = [timed("a", 4, 5, 6), timed("b", 10, 12, 13), timed("c", 10.15, 10.2, 10.3)]
    found = {c.way: (round(c.ratio, 3), c.beyond_noise) for c in compare.changes(base, new)}
    assert found == {"a": (0.5, True), "b": (1.2, False), "c": (1.02, False)}


def test_a_modelled_time_is_the_larger_of_bytes_over_bandwidth_and_instructions_over_the_issue_rate() -> None:
    memory = modelled.Model("a", 10**6, 12 * 10**6, 51)
    assert memory.memory == pytest.approx(4.0)
    assert memory.issue == pytest.approx(51e6 / 33.5e12 * 1e6)
    assert memory.cells == ["a", "12", "51", "4.00", "1.52", "4.00"]
    assert modelled.Model("b", 10**6, 3 * 10**6, 67).cells[-1] == "2.00"
    assert modelled.Model("c", 10**6, 3 * 10**6, None).cells == ["c", "3", "", "1.00", "", "1.00"]


def test_the_modelled_table_is_written_anew_as_the_others_are() -> None:
    text = report.filled("<!-- generated: modelled -->\nold\n<!-- end generated -->", [])
    assert text == f"<!-- generated: modelled -->\n{modelled.modelled_block()}<!-- end generated -->"


def test_modelled_figures_stand_apart_and_are_called_what_they_are() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    heading = page.index("## Modelled, not measured")
    assert heading < page.index("<!-- generated: modelled -->") < page.index("## ", heading + 3)
    for other in report.PAGES:
        assert (ROOT / other).read_text(encoding="utf-8").count("generated: modelled") == (
            other == "docs/benchmarks.md"
        )
