"""The numbers of a sequence, worked out by hand, and the tables they are written to."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from dwm_fast.pacs.sequence.table import (
    LATER_METRICS,
    backward_transfer,
    forgetting,
    forward_transfer,
    incremental_average,
    measures,
    rows_csv,
    sequence_table,
    storage,
    to_csv,
    to_markdown,
    to_rich,
)
from dwm_fast.pacs.tables import Stat

from ..sequence_results_for_tests import MATRICES, SEQUENCE, STAND_IN, results


def test_forgetting_is_from_the_best_earlier_accuracy_to_the_final_one() -> None:
    # photo: best of 0.9, 0.95 is 0.95, ends at 0.70: 0.25; art: 0.8 throughout: 0; sketch is the last.
    assert forgetting([[0.9], [0.95, 0.8], [0.70, 0.8, 0.6]]) == pytest.approx(0.125)
    assert forgetting([[0.5], [0.7, 1.0]]) == pytest.approx(-0.2)  # learning the last one helped
    # The accuracy after the last task is no earlier one: 0.6 -> 0.9 is no forgetting of 0.
    assert forgetting([[0.6], [0.9, 0.1]]) == pytest.approx(-0.3)


def test_backward_transfer_is_from_just_after_learning_to_the_end() -> None:
    # photo: 0.70 - 0.9 = -0.2; art: 0.8 - 0.8 = 0.
    assert backward_transfer([[0.9], [0.95, 0.8], [0.70, 0.8, 0.6]]) == pytest.approx(-0.1)
    assert backward_transfer([[0.5], [0.7, 1.0]]) == pytest.approx(0.2)


def test_the_incremental_average_counts_every_stage_alike() -> None:
    # after the first 0.9, after the second (0.9 + 0.7) / 2 = 0.8, after the third (0.6 + 0.6 + 0.9) / 3 = 0.7
    assert incremental_average([[0.9], [0.9, 0.7], [0.6, 0.6, 0.9]]) == pytest.approx(0.8)


def test_forgetting_by_size_counts_tasks_by_their_images() -> None:
    # lost: 0.25 of photo, which has three times the images of art, and 0 of art
    assert forgetting([[0.9], [0.95, 0.8], [0.70, 0.8, 0.6]], [300, 100, 7]) == pytest.approx(0.1875)


def test_forward_transfer_is_from_a_network_of_its_own_to_just_after_learning() -> None:
    # art 0.8 where it alone gives 0.7, sketch 0.6 where it alone gives 0.9: (0.1 - 0.3) / 2
    assert forward_transfer([[0.9], [0.95, 0.8], [0.70, 0.8, 0.6]], [0.7, 0.9]) == pytest.approx(-0.1)


def test_measures_of_every_method_view_and_seed() -> None:
    found = {(m["method"], m["view"], m["seed"]): m for m in results()["measures"]}
    assert set(found) == set(MATRICES)
    one = found["none", "shared", 0]
    assert one["final"] == {"photo": 0.4, "art": 0.6, "sketch": 0.8}
    assert one["average"] == pytest.approx(0.6)
    assert one["forgetting"] == pytest.approx((0.9 - 0.4 + 0.7 - 0.6) / 2)
    assert one["backward_transfer"] == pytest.approx((0.4 - 0.9 + 0.6 - 0.7) / 2)
    own = found["binary", "masked", 0]
    assert (own["forgetting"], own["backward_transfer"]) == (0, 0)
    # Bits 100 and 300 and seconds 2 and 4 of the two domains added; the first domain's 50 bits and 9 s are in no mean.
    assert (own["bits_added"], own["bits_total"], own["seconds"]) == (200, 450, 3)


def test_measures_need_nothing_but_their_rows() -> None:
    rows = [
        {"method": "m", "view": "v", "seed": 3, "after": a, "on": o, "accuracy": x}
        for a, o, x in (("q", "p", 0.25), ("p", "p", 0.5), ("q", "q", 0.75))
    ]
    tasks = [{"method": "m", "seed": 3, "position": i, "bits": 8 * i, "seconds": i} for i in (0, 1)]
    (one,) = measures(["p", "q"], rows, tasks, {"p": 3, "q": 5})
    assert one == {
        "method": "m",
        "view": "v",
        "seed": 3,
        "final": {"p": 0.25, "q": 0.75},
        "average": 0.5,
        "forgetting": 0.25,
        "backward_transfer": -0.25,
        "incremental_average": 0.5,
        "weighted_forgetting": 0.25,
        "bits_added": 8,
        "bits_total": 8,
        "seconds": 1,
    }


def test_with_networks_of_single_domains_every_method_has_its_forward_transfer() -> None:
    given = results()
    alone = {("art", 0): 0.5, ("sketch", 0): 1.0, ("art", 1): 0.7, ("sketch", 1): 0.7}
    found = measures(SEQUENCE, given["rows"], given["tasks"], dict.fromkeys(SEQUENCE, 10), alone)
    transfers = {(m["method"], m["view"], m["seed"]): m["forward_transfer"] for m in found}
    # none: 0.7 - 0.5 and 0.8 - 1.0; its seed 1: 0.7 - 0.7 and 0.9 - 0.7; binary: 0.8 - 0.5 and 0.7 - 1.0
    assert transfers["none", "shared", 0] == pytest.approx(0)
    assert transfers["none", "shared", 1] == pytest.approx(0.1)
    assert transfers["binary", "masked", 0] == pytest.approx(0)
    rows = sequence_table({**given, "measures": found})
    assert rows[0].forward_transfer.mean == pytest.approx(0.05)
    header = next(line for line in to_markdown(rows).splitlines() if line.startswith("|"))
    assert "| forgetting by size | forward transfer | bits added |" in header
    assert "forward transfer" not in to_markdown(sequence_table(given))


def test_table_has_a_row_per_method_and_view_with_mean_and_spread_over_seeds() -> None:
    rows = sequence_table(results())
    assert [(r.method, r.view, r.seeds) for r in rows] == [
        ("none", "shared", 2),
        ("binary", "shared", 1),
        ("binary", "masked", 1),
    ]
    plain = rows[0]
    # Seeds 0 and 1 end at averages 0.6 and 0.7: mean 0.65, standard deviation 0.1 / sqrt(2).
    assert plain.average.mean == pytest.approx(0.65)
    assert plain.average.spread == pytest.approx(0.1 / 2**0.5)
    assert plain.final["photo"].mean == pytest.approx(0.5)
    assert rows[1].average.spread is None


def test_markdown_names_order_data_and_numbers() -> None:
    text = to_markdown(sequence_table(results()))
    assert text.startswith(f"**After photo, art, sketch in this order, on {STAND_IN}**")
    header, _, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert header == (
        "| method | view | photo | art | sketch | average | backward transfer | forgetting | incremental average | "
        "forgetting by size | bits added | seconds |"
    )
    # after photo 0.9, after art (0.9 + 0.8) / 2, after sketch 0.8
    assert body[2] == "| binary | masked | 0.900 | 0.800 | 0.700 | 0.800 | 0.000 | 0.000 | 0.850 | 0.000 | 200 | 3.0 |"
    old = [{k: v for k, v in one.items() if k not in LATER_METRICS} for one in results()["measures"]]
    earlier = to_markdown(sequence_table({**results(), "measures": old}))
    assert "| binary | masked | 0.900 | 0.800 | 0.700 | 0.800 | 0.000 | 0.000 | 200 | 3.0 |" in earlier
    assert "0.650 ± 0.071" in body[0]
    assert "-0.250 ± 0.071" in body[0]  # backward transfers -0.3 and -0.2
    assert "mean ± standard deviation over 2 seeds" in text
    assert "one seed, so no spread" in to_markdown(sequence_table(results())[1:])
    assert to_markdown([]) == "No runs yet.\n"


def test_csv_has_numbers_that_are_read_back() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(sequence_table(results())))))
    assert len(lines) == 3
    assert float(lines[0]["average"]) == pytest.approx(0.65)
    assert float(lines[0]["average_spread"]) == pytest.approx(0.1 / 2**0.5)
    assert (lines[2]["data"], lines[2]["method"], lines[2]["view"]) == (STAND_IN, "binary", "masked")
    assert float(lines[2]["final_sketch"]) == 0.7
    assert (float(lines[2]["bits_added"]), float(lines[2]["seconds"]), lines[2]["seeds"]) == (200, 3, "1")


def test_rows_csv_has_a_line_per_pair_of_domains() -> None:
    given: dict[str, Any] = results()
    lines = list(csv.DictReader(io.StringIO(rows_csv(given))))
    assert len(lines) == len(given["rows"]) == 4 * 6
    found = {(r["method"], r["view"], r["seed"], r["after"], r["on"]): float(r["accuracy"]) for r in lines}
    assert found["none", "shared", "0", "sketch", "photo"] == 0.4
    assert found["none", "shared", "1", "photo", "photo"] == 0.9
    assert {r["data"] for r in lines} == {STAND_IN}


def test_terminal_table_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(to_rich(sequence_table(results())))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for word in (*SEQUENCE, "binary", "masked", "0.650", "±0.071", "200 bit", "3 s", STAND_IN):
        assert word in text, word


@pytest.mark.parametrize(
    ("bits", "text"),
    [(None, "–"), (0, "0"), (200, "200 bit"), (80_000, "10.0 kB"), (11_166_912, "1.396 MB")],
)
def test_storage_is_told_in_units_people_read(bits: float | None, text: str) -> None:
    assert storage(Stat(bits, None)) == text
