"""The README's picture and caption say what the recorded run says."""

from __future__ import annotations

import copy
from pathlib import Path

from dwm_fast._bench.dev import picture

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_the_picture_and_the_caption_of_the_recorded_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert picture.readme(text, picture.recorded(ROOT)) == text, "run python -m benchmarks.dev.picture"
    assert (ROOT / picture.FIGURE).is_file()


def test_the_caption_gives_means_over_the_seeds():
    results = copy.deepcopy(picture.recorded(ROOT))
    plain = picture.rows_of(results, "fine-tuning every weight")
    assert [row["seed"] for row in plain] == [0, 1, 2]
    for row, value in zip(plain, (0.1, 0.2, 0.6), strict=True):
        row["source_after"] = value
    assert "leaves 0.300 of 0.951 on photo" in picture.caption(results)


def test_the_picture_is_drawn_the_same_every_time(tmp_path):
    results = picture.recorded(ROOT)
    for name in ("a.svg", "b.svg"):
        picture.draw(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
