"""Every figure is drawn for any part of a grid, names the data set, and comes out the same twice."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from dwm_fast.pacs.page.figure_style import COLOURS
from dwm_fast.pacs.pairs.figures import draw_all
from dwm_fast.pacs.pairs.mask_figures import chance_overlap

from ..results_for_tests import STAND_IN, results, row, two_seeds


def learned():
    """Results whose masks tell how they were learned, but for one that learns nothing."""
    study = results(two_seeds())
    history = [{"loss": 1.0 / (epoch + 1), "fraction_kept": 1 - 0.2 * epoch, "coefficient": 1.0} for epoch in range(3)]
    for mask in study["masks"][1:]:
        mask["history"] = history
    study["masks"][0]["history"] = []
    return study


def svg(files, name):
    """The figure as text: it is drawn as outlines; the writer leaves the words beside them as a comment."""
    return files[f"{name}.svg"].decode()


@pytest.fixture(scope="module")
def drawn():
    return draw_all(learned())


def test_every_figure_comes_as_png_and_svg(drawn):
    figures = ("accuracy", "retention", "sparsity", "overlap", "training")
    assert list(drawn) == [f"{figure}.{kind}" for figure in figures for kind in ("png", "svg")]
    for name, content in drawn.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_every_figure_names_the_stand_in_for_what_it_is(drawn):
    for name in ("accuracy", "retention", "sparsity", "overlap", "training"):
        assert STAND_IN in svg(drawn, name), name


def test_axes_are_labelled(drawn):
    text = {name: svg(drawn, name) for name in ("accuracy", "retention", "sparsity", "overlap", "training")}
    assert "loss on training images (nats)" in text["training"]
    assert "accuracy (fraction of test images)" in text["accuracy"]
    assert "target accuracy (fraction)" in text["retention"]
    assert "source accuracy (fraction)" in text["retention"]
    assert "kept (fraction of the layer's weights)" in text["sparsity"]
    assert "Jaccard index" in text["overlap"]
    assert "none: plain fine-tuning" in text["retention"]


def test_seeds_are_counted_truthfully(drawn):
    assert "mean and standard deviation over 2 seeds" in svg(drawn, "accuracy")
    uneven = [*two_seeds(), row("art", "photo", "none", 0, 0.0, 0.0)]
    files = draw_all(results(uneven) | {"masks": [], "overlap": []})
    assert "over up to 2 seeds" in svg(files, "accuracy")


def test_same_results_draw_the_same_bytes():
    again, first = (draw_all(results(two_seeds()) | {"masks": [], "rows": []}) for _ in range(2))
    assert list(again) == ["overlap.png", "overlap.svg"]
    assert again == first


def test_one_pair_one_seed_without_baseline_is_drawn():
    rows = [
        row("photo", "sketch", "binary", 0, 0.1, 0.0),
        row("photo", "sketch", "other", 0, 0.1, 0.0, init="new"),
    ]
    files = draw_all(results(rows, real=True) | {"masks": [], "overlap": []})
    assert list(files) == ["accuracy.png", "accuracy.svg", "retention.png", "retention.svg"]
    text = svg(files, "accuracy")
    assert "one seed" in text
    assert "PACS" in text
    assert "stand-in" not in text


def test_several_policies_and_a_missing_value_are_drawn():
    rows = [row("photo", "sketch", "binary", 0, 0.1, 0.0, bn_policy=policy) for policy in ("frozen", "shared")]
    rows[0]["source_after"] = None
    files = draw_all(results(rows) | {"masks": [], "overlap": []})
    assert "binary S_start · frozen" in svg(files, "accuracy")
    assert "batch norm shared" in svg(files, "retention")


def test_several_rates_of_none_are_told_apart_and_one_is_the_baseline():
    def drawn(rates):
        rows = [row("photo", "sketch", "none", 0, rate, 0.0, lr=rate) for rate in rates]
        rows.append(row("photo", "sketch", "binary", 0, 0.1, 0.0))
        files = draw_all(results(rows) | {"masks": [], "overlap": []})
        return svg(files, "accuracy"), svg(files, "retention")

    accuracy, retention = drawn((3e-4, 1e-4))
    assert "none · 0.0003" in accuracy
    assert "none · 0.0001" in accuracy
    assert "none in another way" in retention
    accuracy, retention = drawn((3e-4,))
    assert "0.0003" not in accuracy
    assert "none in another way" not in retention


def test_no_data_draws_nothing():
    assert draw_all(results([]) | {"masks": [], "overlap": []}) == {}


def test_chance_level_is_that_of_independent_masks():
    import numpy

    layers = [
        {"name": "a", "kept": 30_000, "total": 100_000},
        {"name": "b", "kept": 90_000, "total": 100_000},
    ]
    other = [{"name": "a", "kept": 50_000, "total": 100_000}, {"name": "b", "kept": 20_000, "total": 100_000}]
    masks = [
        {"method": "binary", "seed": 0, "source": "photo", "layers": layers},
        {"method": "binary", "seed": 0, "source": "art", "layers": other},
    ]
    random = numpy.random.default_rng(0)
    draws = [
        numpy.concatenate([random.permutation(layer["total"]) < layer["kept"] for layer in kind])
        for kind in (layers, other)
    ]
    measured = (draws[0] & draws[1]).sum() / (draws[0] | draws[1]).sum()
    assert chance_overlap({"masks": masks}, "binary", "photo", "art") == pytest.approx(measured, abs=0.005)
    assert chance_overlap({"masks": masks}, "binary", "photo", "sketch") is None


def test_colours_differ_and_contrast_with_white():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert len(set(COLOURS.values())) == len(COLOURS)
    for colour in COLOURS.values():
        assert 1.05 / (luminance(colour) + 0.05) > 2.5


def test_import_leaves_matplotlib_alone():
    code = "import sys, dwm_fast.pacs.pairs.figures, dwm_fast.pacs.pairs.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
