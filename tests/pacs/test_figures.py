"""Every figure is drawn for any part of a grid, names the data set, and comes out the same twice."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from dwm_fast.errors import DataError
from dwm_fast.pacs.figure_style import COLOURS
from dwm_fast.pacs.figures import draw_all
from dwm_fast.pacs.mask_figures import chance_overlap

from .results_for_tests import STAND_IN, results, row, two_seeds

HISTORY = [
    {"stage": stage, "epoch": epoch, "accuracy": 0.2 * epoch, "source": "photo", "method": method, "seed": 0}
    for stage, method in (("source", None), ("mask", "binary"), ("target", "none"))
    for epoch in range(3)
]


def names(paths):
    return [path.name for path in paths]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_all(results(two_seeds()), tmp_path_factory.mktemp("figures") / "made", HISTORY)


def test_every_figure_comes_as_png_and_svg(drawn):
    figures = ("accuracy", "retention", "sparsity", "overlap", "training")
    assert names(drawn) == [f"{figure}.{kind}" for figure in figures for kind in ("png", "svg")]
    for path in drawn:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_every_figure_names_the_stand_in_for_what_it_is(drawn):
    for path in drawn:
        if path.suffix == ".svg":  # text is drawn as outlines; the writer leaves it beside them as a comment
            assert STAND_IN in path.read_text(), path


def test_axes_are_labelled(drawn):
    text = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    assert "accuracy (fraction of test images)" in text["accuracy"]
    assert "target accuracy (fraction)" in text["retention"]
    assert "source accuracy (fraction)" in text["retention"]
    assert "kept (fraction of the layer's weights)" in text["sparsity"]
    assert "Jaccard index" in text["overlap"]
    assert "none: plain fine-tuning" in text["retention"]


def test_seeds_are_counted_truthfully(drawn, tmp_path):
    text = next(path for path in drawn if path.name == "accuracy.svg").read_text()
    assert "mean and standard deviation over 2 seeds" in text
    uneven = [*two_seeds(), row("art", "photo", "none", 0, 0.0, 0.0)]
    accuracy = draw_all(results(uneven) | {"masks": [], "overlap": []}, tmp_path)[1]
    assert "over up to 2 seeds" in accuracy.read_text()


def test_same_results_draw_the_same_bytes(drawn, tmp_path):
    again = draw_all(results(two_seeds()) | {"masks": [], "rows": []}, tmp_path)
    assert names(again) == ["overlap.png", "overlap.svg"]
    first = draw_all(results(two_seeds()) | {"masks": [], "rows": []}, tmp_path / "second")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]


def test_one_pair_one_seed_without_baseline_is_drawn(tmp_path):
    rows = [
        row("photo", "sketch", "binary", 0, 0.1, 0.0),
        row("photo", "sketch", "other", 0, 0.1, 0.0, init="new"),
    ]
    paths = draw_all(results(rows, real=True) | {"masks": [], "overlap": []}, tmp_path)
    assert names(paths) == ["accuracy.png", "accuracy.svg", "retention.png", "retention.svg"]
    text = paths[1].read_text()
    assert "one seed" in text
    assert "PACS" in text
    assert "stand-in" not in text


def test_several_policies_and_a_missing_value_are_drawn(tmp_path):
    rows = [row("photo", "sketch", "binary", 0, 0.1, 0.0, bn_policy=policy) for policy in ("frozen", "shared")]
    rows[0]["source_after"] = None
    paths = draw_all(results(rows) | {"masks": [], "overlap": []}, tmp_path)
    assert "binary S_start · frozen" in paths[1].read_text()
    assert "batch norm shared" in paths[3].read_text()


def test_several_rates_of_none_are_told_apart_and_one_is_the_baseline(tmp_path):
    def drawn(rates, folder):
        rows = [row("photo", "sketch", "none", 0, rate, 0.0, lr=rate) for rate in rates]
        rows.append(row("photo", "sketch", "binary", 0, 0.1, 0.0))
        paths = draw_all(results(rows) | {"masks": [], "overlap": []}, tmp_path / folder)
        return paths[1].read_text(), paths[3].read_text()

    accuracy, retention = drawn((3e-4, 1e-4), "two")
    assert "none · 0.0003" in accuracy
    assert "none · 0.0001" in accuracy
    assert "none in another way" in retention
    accuracy, retention = drawn((3e-4,), "one")
    assert "0.0003" not in accuracy
    assert "none in another way" not in retention


def test_no_data_draws_nothing(tmp_path):
    assert draw_all(results([]) | {"masks": [], "overlap": []}, tmp_path) == []


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
    code = "import sys, dwm_fast.pacs.figures, dwm_fast.pacs.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write") as error:
        draw_all(results([]) | {"masks": []}, tmp_path / "file")
    assert "\n" not in str(error.value)
