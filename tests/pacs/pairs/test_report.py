"""The report is one file that opens with the truth about the runs, and says on what data."""

from __future__ import annotations

import base64
import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from dwm_fast.pacs.pairs import report
from dwm_fast.pacs.pairs.finding import finding, interval

from ..results_for_tests import STAND_IN, results, row, two_seeds

VOID = {"meta", "img", "br", "hr", "link", "input"}
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")


class Page(HTMLParser):
    """Collects text, headings and links, and checks that tags are closed in order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.headings, self.links, self.images = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src", "action", "data", "srcset") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
            if self.open and self.open[-1] in ("h1", "h2"):
                self.headings.append(data)


def page(study, figures=None, command="dwm-fast pacs"):
    source = report.page(study, figures or {}, command)
    return source, Page(source)


def test_report_is_self_contained():
    figures = dict.fromkeys(("accuracy.png", "accuracy.svg", "retention.png"), PNG)
    source, parsed = page(results(two_seeds(), real=True), figures)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert "<script" not in source
    assert "<link" not in source
    assert [link.split(";")[0] for link in parsed.links] == ["data:image/svg+xml", "data:image/png"]
    assert base64.b64decode(parsed.links[1].split(",")[1]) == PNG
    assert all(image["alt"] for image in parsed.images)


def test_report_opens_with_the_finding_and_has_every_part():
    source, parsed = page(results(two_seeds()), command="dwm-fast pacs --seeds 0,1")
    text = " ".join(parsed.text)
    assert parsed.headings[:2] == ["Weight masks for domain transfer", "Finding"]
    assert text.index("keeps the source best") < text.index("S gain stands above")
    assert "+0.200" in text
    for promised in (
        "S gain",
        "T drop",
        "“shared”",
        "“masked”",
        "dwm-fast pacs --seeds 0,1",
        "binary.tau",
        "2.11",
    ):
        assert promised in text
    assert text.count(STAND_IN) >= 3
    assert "prefers-color-scheme: dark" in source


def test_report_has_no_nan_and_no_none():
    study = results(two_seeds())
    study["rows"][0]["s_gain"] = math.nan
    study["rows"][1]["t_drop"] = None
    study["config"]["rate"] = math.inf
    study["masks"][0] |= {"within_budget": None, "coefficient": None}
    _, parsed = page(study)
    words = set(re.findall(r"[A-Za-z]+", " ".join(parsed.text)))
    assert not words & {"nan", "NaN", "inf", "None"}


def test_everything_is_escaped():
    hostile = '<script>alert("x")</script>'
    study = results(two_seeds(), name=hostile)
    study["config"][hostile] = hostile
    study["versions"]["device"] = hostile
    study["data"]["classes"] = [hostile]
    for run in study["rows"]:
        run["bn_policy"] = hostile
    source, parsed = page(study, command=hostile)
    assert "<script" not in source
    assert hostile in "".join(parsed.text)


def test_empty_and_partial_studies_have_a_report():
    empty = results([]) | {"masks": [], "overlap": [], "sources": []}
    assert "No run has finished" in " ".join(page(empty)[1].text)
    partial = [*two_seeds(), row("art", "photo", "none", 0, 0.0, 0.0)]
    text = " ".join(page(results(partial))[1].text)
    assert "uneven" in text
    assert "2 pairs × 2 seeds" in text


def test_published_table_stands_only_beside_real_data():
    assert "Published table" in page(results(two_seeds(), real=True))[0]
    assert "Published table" not in page(results(two_seeds()))[0]


def columns_of(source, heading):
    """Names of the columns, and cells of the rows as text, of the first table under a heading."""
    table = source.split(f"{heading}</h2>")[1].split("</table>")[0]
    names = re.findall(r'<th scope="col">(.*?)</th>', table)
    lines = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in table.split("<tr>")[2:]]
    return names, [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in line] for line in lines]


def test_columns_say_from_where_to_where_and_those_that_never_change_are_said_once():
    source, parsed = page(results(two_seeds()))
    names, lines = columns_of(source, "S gain and T drop")
    assert names == ["method", "kept", "photo → art, sketch"]
    assert lines[1] == ["binary S_start", "0.250", "+0.200 ± 0.071 −0.010 ± 0.000"]
    assert "In every row: batch norm frozen, learning rate 0.0003." in " ".join(parsed.text)
    rows = [*two_seeds(), *(row("photo", t, "edit", k, 0.1, 0.0, lr=1e-3) for t in ("art", "sketch") for k in (0, 1))]
    source, parsed = page(results(rows))
    assert columns_of(source, "S gain and T drop")[0] == ["method", "learning rate", "kept", "photo → art, sketch"]
    assert "In every row: batch norm frozen." in " ".join(parsed.text)


def test_the_masked_view_has_a_row_per_method_however_often_it_was_fine_tuned():
    rows = [row("photo", "art", "none", 0, 0.0, 0.0)]
    for init in ("S_start", "S_end", "random"):
        rows += [row("photo", "art", "binary", 0, 0.1, 0.0, init=init)]
        rows += [row("photo", "art", "binary", 0, 0.5, -0.1, view="masked", init=init)]
    source, _ = page(results(rows))
    masked = source.split("View “masked”")[1].split("</table>")[0]
    assert masked.count("<tr>") == 2  # the header, and binary once
    assert "+0.500" in masked
    assert columns_of(source, "Accuracies")[1][-1][0] == "binary"
    assert sum(line[1] == "masked" for line in columns_of(source, "Accuracies")[1]) == 1


@pytest.mark.parametrize(
    ("whole", "under_mask", "within", "said"),
    [
        (0.95, 0.94, [True, True], "met by 2 of 2"),
        (0.95, 0.94, [True, False], "met by 1 of 2"),
        (0.15, 0.143, [True, True], "met by 2 of 2; at chance, as the network without a mask is"),
        (0.95, 0.143, [True, True], "at chance all the same: the budget is on the loss over training images"),
        (0.95, 0.143, [False, False], "met by 0 of 2; at chance: the mask keeps too little"),
        (0.95, 0.143, [None, None], "at chance: the mask keeps too little"),
    ],
)
def test_a_budget_that_was_met_beside_chance_says_why(whole, under_mask, within, said):
    study = results(two_seeds())
    study["sources"] = [one | {"accuracy": whole} for one in study["sources"] if one["source"] == "photo"]
    masks = [mask for mask in study["masks"] if mask["source"] == "photo"]
    study["masks"] = [
        m | {"masked_accuracy": under_mask, "within_budget": w} for m, w in zip(masks, within, strict=True)
    ]
    names, lines = columns_of(page(study)[0], "Source networks and masks")
    assert said in lines[1][names.index("source budget")]
    assert ("chance" in lines[0][names.index("source budget")]) == (whole < 0.2)


def test_every_cell_carries_its_columns_name_for_narrow_screens():
    source, _ = page(results(two_seeds()))
    assert source.count("<td>") == 0
    assert 'data-name="photo → art, sketch"' in source
    assert "overflow-x" not in source


def test_finding_names_the_winner_its_gain_and_its_cost():
    said = finding(results(two_seeds()))
    assert said[0] == (
        f"On the {STAND_IN}, binary masking with S_start (batch norm frozen) keeps the source best: "
        "accuracy 0.600 against 0.400 with plain fine-tuning "
        "(S gain +0.200 ± 0.071); before fine-tuning it was 0.950."
    )
    assert said[1] == "On the target it reaches 0.890 against 0.900 (T drop -0.010 ± 0.000), equal within two points."
    text = " ".join(said)
    assert "stays at 0.940" in text
    assert "0.25 of the weights kept" in text
    assert "2 pairs × 2 seeds" in text
    assert "highest of 2 configurations" in text
    assert "procedural, not PACS" in text


def test_finding_says_when_no_mask_helps():
    rows = [row("photo", "art", "none", 0, 0.0, 0.0), row("photo", "art", "binary", 0, -0.1, 0.03)]
    said = " ".join(finding(results(rows, real=True)))
    assert said.startswith("On PACS, no mask keeps the source better than plain fine-tuning does.")
    assert "0.300 against 0.400" in said
    assert "more than two points above" in said
    assert "one seed" in said
    assert "procedural" not in said


def test_finding_offers_the_best_at_equal_target():
    rows = [
        row("photo", "art", "none", 0, 0.0, 0.0),
        row("photo", "art", "binary", 0, 0.3, -0.1),
        row("photo", "art", "edit", 0, 0.2, -0.01),
        row("photo", "art", "naive", 0, 0.1, 0.0),
    ]
    said = finding(results(rows, real=True))
    assert "binary" in said[0]
    assert "more than two points below" in said[1]
    assert "edit masking with S_start (batch norm frozen) keeps most: S gain +0.200, T drop -0.010" in said[2]


def test_finding_names_the_rate_where_it_alone_tells_ways_apart():
    rows = [
        row("photo", "art", "none", 0, 0.0, 0.0),
        row("photo", "art", "none", 0, 0.1, -0.2, lr=1e-4),
        row("photo", "art", "binary", 0, 0.3, 0.0),
        row("photo", "art", "binary", 0, 0.2, 0.0, lr=1e-3),
        row("photo", "art", "binary", 0, 0.5, 0.0, view="masked"),
        row("photo", "art", "binary", 0, 0.4, 0.0, view="masked", lr=1e-3),
    ]
    said = " ".join(finding(results(rows, real=True)))
    assert "binary masking with S_start (batch norm frozen, rate 0.0003) keeps the source best: accuracy 0.700" in said
    assert "Plain fine-tuning with batch norm frozen at rate 0.0001 leaves 0.500 on the source" in said
    assert "its source network stays at 0.900" in said
    assert "highest of 2 configurations" in said


def test_finding_says_of_pulled_weights_what_the_masked_view_has_and_what_it_has_where_they_are_frozen():
    pulled = {"kept_decay": 10.0}
    rows = [
        row("photo", "art", "none", 0, 0.0, 0.0),
        row("photo", "art", "binary", 0, 0.1, 0.0),
        {**row("photo", "art", "binary", 0, 0.3, 0.0), **pulled},
        row("photo", "art", "binary", 0, 0.5, 0.0, view="masked"),
        {**row("photo", "art", "binary", 0, 0.2, 0.0, view="masked"), **pulled},
    ]
    said = " ".join(finding(results(rows, real=True)))
    assert "(batch norm frozen, rate 0.0003, pull 10) keeps the source best: accuracy 0.700" in said
    assert "its source network is at 0.600, with" in said
    assert "Where they are frozen it stays at 0.900." in said


def test_finding_compares_only_runs_that_all_have():
    rows = [*two_seeds(), row("art", "photo", "binary", 0, 0.9, 0.0)]
    said = " ".join(finding(results(rows)))
    assert "S gain +0.200" in said
    assert "Only the runs that every configuration has" in said


def test_finding_counts_the_sources_won():
    rows = [
        row(source, "sketch", method, 0, gain, 0.0)
        for source, gains in (("photo", (0.3, 0.1)), ("art", (0.1, 0.2)))
        for method, gain in (("none", 0.0), ("binary", gains[0]), ("edit", gains[1]))
    ]
    assert "By source domain, binary masking keeps the source best on 1 of 2 (otherwise edit on art)." in finding(
        results(rows)
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "has finished yet"),
        ([row("photo", "art", "binary", 0, 0.1, 0.0)], "no plain fine-tuning"),
        ([row("photo", "art", "none", 0, 0.0, 0.0)], "only plain fine-tuning"),
        (
            [row("photo", "art", "none", 0, 0.0, 0.0), row("art", "photo", "binary", 0, 0.1, 0.0)],
            "no pair and seed",
        ),
        (
            [row("photo", "art", "none", 0, 0.0, 0.0), row("photo", "art", "binary", 0, math.nan, 0.0)],
            "no S gain",
        ),
    ],
)
def test_finding_claims_nothing_without_a_comparison(rows, words):
    said = finding(results(rows))
    assert len(said) == 1
    assert words in said[0]


def test_finding_says_how_sure_the_differences_are_from_six_paired_runs_on():
    gains, drops = (0.1, 0.3, 0.2, 0.2, 0.1, 0.3), (0.01, -0.02, 0.01, 0.0, -0.01, 0.02)
    runs = [("none", 0.0, 0.0, k) for k in range(6)] + [
        ("binary", g, d, k) for k, (g, d) in enumerate(zip(gains, drops, strict=True))
    ]
    rows = [row("photo", "sketch", method, seed, gain, drop) for method, gain, drop, seed in runs]
    said = " ".join(finding(results(rows, real=True)))
    (low, high), (worst, best) = interval(gains), interval(drops)
    assert "Over 6 paired runs the means lie, with 95 % confidence (bootstrap)" in said
    assert (
        f"S gain from {low:+.3f} to {high:+.3f}, which excludes 0; "
        f"T drop from {worst:+.3f} to {best:+.3f}, which holds 0." in said
    )
    assert "keeps the source better than plain fine-tuning in" not in said  # of one pair
    assert "95 %" not in " ".join(finding(results([r for r in rows if r["seed"] < 5], real=True)))


def test_an_interval_is_that_of_all_resamples():
    """Three differences have 27 resamples; the quantiles of 9999 draws are those of all."""
    values = (0.0, 1.0, 5.0)
    means = [sum(chosen) / 3 for chosen in itertools.product(values, repeat=3)]
    assert interval(values) == pytest.approx((min(means), max(means)))  # 1/27 of the draws lie at each end
    assert interval([0.2] * 8) == pytest.approx((0.2, 0.2))
