"""What a sequence shows people: figures that name the data, a finding that is true, one self-contained page."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from dwm_fast.pacs.page.figure_style import colour
from dwm_fast.pacs.sequence.figures import draw_all
from dwm_fast.pacs.sequence.finding import finding
from dwm_fast.pacs.sequence.report import page

from ..sequence_results_for_tests import SEQUENCE, STAND_IN, results


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    return draw_all(results())


def only(given: dict[str, Any], *methods: str, seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """The results with these methods and seeds alone."""
    chosen = {
        part: [one for one in given[part] if one["method"] in methods and one["seed"] in seeds]
        for part in ("tasks", "rows", "measures")
    }
    return {**given, **chosen, "sources": [one for one in given["sources"] if one["seed"] in seeds]}


def test_every_figure_comes_as_png_and_svg_and_names_the_stand_in(drawn: dict[str, bytes]) -> None:
    names = ("sequence", "storage", "forgetting")
    assert list(drawn) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for name, content in drawn.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
            continue
        assert ElementTree.fromstring(content).tag.endswith("svg")
        assert STAND_IN in content.decode()
        assert "mean and standard deviation over up to 2 seeds" in content.decode()


def test_figures_label_axes_domains_and_views(drawn: dict[str, bytes]) -> None:
    text = {name.partition(".")[0]: content.decode() for name, content in drawn.items() if name.endswith(".svg")}
    for word in ("mean over the domains seen", "on photo", "on art", "on sketch", "after learning", "binary, masked"):
        assert word in text["sequence"], word
    assert "stored per domain added" in text["storage"]
    assert "mean over all domains but the last" in text["forgetting"]


def test_the_same_results_draw_the_same_bytes(drawn: dict[str, bytes]) -> None:
    assert draw_all(results()) == drawn


def test_one_method_and_two_domains_are_drawn() -> None:
    given = only(results(), "binary")
    given["rows"] = [row for row in given["rows"] if row["position"] < 2]
    given["sequence"] = SEQUENCE[:2]
    for one in given["measures"]:
        one["bits_added"] = 0
    assert "one seed" in draw_all(given)["sequence.svg"].decode()


def test_a_preset_has_its_methods_colour() -> None:
    assert colour("piggyback-paper") == colour("piggyback") != colour("packnet")
    assert colour("other-paper") == colour("other")


def test_finding_says_who_is_best_who_forgets_and_what_limits_it() -> None:
    said = finding(results())
    assert said[0] == (
        f"On the {STAND_IN}, after photo, art and sketch in this order, binary (view masked) has the highest average "
        "accuracy: 0.800, against 0.650 ± 0.071 with plain fine-tuning (none)."
    )
    # none forgets (0.5 + 0.1) / 2 and (0.3 + 0.1) / 2; binary's shared view (0.1 + 0) / 2.
    assert said[1] == (
        "Nothing is forgotten by binary (view masked); forgetting of the others: none +0.250 ± 0.071, binary +0.050."
    )
    assert "stores 200 bit and learns for 3.0 s" in said[2]
    text = " ".join(said)
    assert "With one seed there is no spread" in text
    assert "procedural, not PACS" in text
    assert "which domain an image is from is known" in text


def test_finding_on_real_images_and_of_the_baseline_alone() -> None:
    alone = finding(only(results(real=True), "none"))
    assert alone[0].startswith("On PACS, after photo, art and sketch in this order, none has the highest")
    assert "against" not in alone[0]
    assert alone[1] == "Every method forgets: none +0.250 ± 0.071."
    assert "procedural" not in " ".join(alone)
    assert "With one seed" not in " ".join(alone)
    assert finding({**results(), "measures": []}) == [f"No sequence on the {STAND_IN} has finished yet."]


def test_report_is_one_self_contained_page_with_every_part(drawn: dict[str, bytes]) -> None:
    source = page(results(), drawn, "dwm-fast pacs --sequence photo,art,sketch")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", source)
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", source)
    assert headings == [
        "Domain after domain, one backbone",
        "Finding",
        "After the last domain",
        "Figures",
        "Accuracy after every domain",
        "What was learned",
        "What the words mean",
        "Data",
        "How to reproduce",
    ]
    assert source.count("data:image/svg+xml;base64,") == 3
    assert source.count("<strong>0.800</strong>") == 1
    for words in (
        STAND_IN,
        "photo → art → sketch",
        "2 seeds",
        "dwm-fast pacs --sequence",
        "fraction kept 0.25",
        "ordinary training, shared by all methods",
        "binary: every option",
        "Below 0: later domains helped",
    ):
        assert words in source, words


def test_report_shows_the_accuracies_after_every_domain() -> None:
    source = page(only(results(), "binary"), {}, "x")
    table = source.split("Accuracy after every domain</h2>")[1].split("</table>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in table.split("<tr>")[2:]]
    assert [line[1:] for line in cells[3:]] == [
        ["photo", "0.900", "", ""],
        ["art", "0.900", "0.800", ""],
        ["sketch", "0.900", "0.800", "0.700"],
    ]


def test_names_in_the_report_are_text_and_not_markup() -> None:
    given = results()
    given["data"]["name"] = "<b>data</b>"
    given["tasks"][0]["figures"] = {"<i>": "<script>"}
    text = page(given, {}, "<u>")
    assert not re.search(r"<b>data|<i>|<script|<u>", text)
