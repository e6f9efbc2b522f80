"""Several orders of the domains in one run: each as a run of its own would be, and means over them that are told."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from dwm_fast.errors import InputError
from dwm_fast.pacs.config import StudyConfig, builtin_defaults, from_dict, load_config
from dwm_fast.pacs.engines import Told, made_from, order
from dwm_fast.pacs.search import Search, read_grid
from dwm_fast.pacs.sequence import SequenceStudy
from dwm_fast.pacs.sequence.figures import draw_all
from dwm_fast.pacs.sequence.lab import SequenceLab
from dwm_fast.pacs.study import Stage, Study

from ..sequence_for_tests import draw_nothing, offer_toys, sequence_config
from ..study_for_tests import stages, tiny, tiny_data, without_seconds

ROTATIONS = [("photo", "sketch", "art"), ("sketch", "art", "photo"), ("art", "photo", "sketch")]
FIXED: dict[str, Any] = {"methods": ["none"], "seeds": [0, 1]}
FORKED = "photo,sketch,art;photo,art,sketch"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    offer_toys(monkeypatch)
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and results of three orders and two seeds, of a method with two views."""
    folder = tmp_path_factory.mktemp("orders")
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch)
        offer_toys(patch)
        draw_nothing(patch)
        return folder, SequenceStudy(sequence_config(**FIXED, orders=3), folder).run()


def without_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "order"} for row in rows]


def test_a_number_asks_for_rotations_in_which_every_domain_has_every_place_once() -> None:
    config = from_dict({"sequence": "photo,art,cartoon,sketch", "orders": 4}, builtin_defaults())
    orders = config.in_orders()
    assert orders[0] == config.sequence == ("photo", "art", "cartoon", "sketch")
    for place in zip(*orders, strict=True):
        assert sorted(place) == ["art", "cartoon", "photo", "sketch"]


def test_an_order_gives_what_a_run_of_its_own_gives(rotated: Any, tmp_path: Path, toys: None) -> None:
    results = rotated[1]
    assert results["orders"] == [list(order) for order in ROTATIONS]
    assert results["sequence"] == list(ROTATIONS[0])
    alone = SequenceStudy(sequence_config(**FIXED, sequence=ROTATIONS[2]), tmp_path).run()
    assert "orders" not in alone
    for part in ("rows", "tasks", "measures"):
        own = [one for one in results[part] if one["order"] == ",".join(ROTATIONS[2])]
        assert without_seconds(without_order(own)) == without_seconds(alone[part]), part
        assert len(results[part]) == 3 * len(own)
        assert not [one for one in alone[part] if "order" in one]


def test_the_table_is_over_orders_and_seeds_and_each_order_has_its_rows(rotated: Any) -> None:
    folder, results = rotated
    averages, photo = [], []
    for sequence in ROTATIONS:
        for seed in (0, 1):
            last = [
                row["accuracy"]
                for row in results["rows"]
                if (row["order"], row["seed"]) == (",".join(sequence), seed)
                and (row["method"], row["view"], row["after"]) == ("none", "shared", sequence[-1])
            ]
            averages.append(fmean(last))
            photo.append(last[sequence.index("photo")])
    with (folder / "table.csv").open() as file:
        line = next(csv.DictReader(file))
    assert (line["method"], line["view"], line["seeds"], line["orders"]) == ("none", "shared", "2", "3")
    assert float(line["average"]) == pytest.approx(fmean(averages))
    assert float(line["average_spread"]) == pytest.approx(stdev(averages))
    assert float(line["final_photo"]) == pytest.approx(fmean(photo))
    text = (folder / "table.md").read_text()
    assert "**After photo, sketch, art in 3 orders, on" in text
    assert "mean ± standard deviation over 3 orders × 2 seeds" in text
    assert text.count("\n| sketch, art, photo |") == 2  # views of none
    with (folder / "results.csv").open() as file:
        assert Counter(row["order"] for row in csv.DictReader(file)) == {",".join(o): 24 for o in ROTATIONS}


def test_report_and_finding_say_which_orders(rotated: Any) -> None:
    folder = rotated[0]
    page = (folder / "report.html").read_text()
    assert "3 domains in 3 orders" in page
    assert "<h2>Each order by itself</h2>" in page
    assert "2 seeds" in page
    assert "The orders are photo → sketch → art; sketch → art → photo; art → photo → sketch." in page
    assert "after photo, sketch and art in 3 orders, " in page
    assert "on these same test images, in 3 orders of domains" in page


def test_figures_of_several_orders_have_a_panel_each(rotated: Any) -> None:
    drawn = draw_all(rotated[1])["sequence.svg"].decode()
    for words in ("order 1", "order 3", "all orders", "over 3 orders × 2 seeds"):
        assert words in drawn, words
    assert "order 4" not in drawn


def test_a_folder_of_one_order_widens_and_does_not_shrink(tmp_path: Path, toys: None) -> None:
    def files() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "stages").iterdir()}

    one = SequenceStudy(sequence_config(methods=["none"]), tmp_path).run()
    before = files()
    wider = SequenceStudy(sequence_config(methods=["none"], orders=2), tmp_path).run()
    assert {name: time for name, time in files().items() if name in before} == before
    assert len(files()) == 2 * len(before)
    assert without_order(wider["rows"])[: len(one["rows"])] == one["rows"]
    with pytest.raises(InputError, match=r"would leave out \(sequence sketch,art,photo\)"):
        SequenceStudy(sequence_config(methods=["none"]), tmp_path)
    SequenceStudy(sequence_config(methods=["none"], orders=3), tmp_path)


def test_orders_that_begin_alike_share_stages_that_are_done_once(
    tmp_path: Path, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, learn = [], SequenceLab._learn

    def counted(self: SequenceLab, method: str, position: int, seed: int) -> Any:
        learned.append(self.sequence[: position + 1])
        return learn(self, method, position, seed)

    monkeypatch.setattr(SequenceLab, "_learn", counted)
    study = SequenceStudy(sequence_config(methods=["none"], sequence=FORKED), tmp_path)
    names = [stage.name for stage in study.stages()]
    assert len(names) == len(set(names)) == 1 + 1 + 2 + 2
    results = study.run()
    assert len(learned) == len(set(learned)) == 5
    assert [m["order"] for m in results["measures"]] == [o for o in FORKED.split(";") for _ in ("shared", "masked")]
    sizes = {name: (tmp_path / "stages" / f"{name}.safetensors").stat().st_size for name in names}
    thin = [name for name in names if sizes[name] < 10_000]
    assert thin == [f"sequence-none-{seen}-seed0" for seen in ("photo", "photo-sketch", "photo-art")]


def test_with_alone_every_order_measures_its_forward_transfer(tmp_path: Path, toys: None) -> None:
    config = sequence_config(methods=["piggyback"], sequence="photo,art", orders=2, alone=True)
    results = SequenceStudy(config, tmp_path).run()
    assert stages(tmp_path)[-2:] == ["source-art-seed0", "source-photo-seed0"]
    own = {one["source"]: one["accuracy"] for one in results["alone"]}
    assert set(own) == {"photo", "art"}
    for measured in results["measures"]:
        last = measured["order"].split(",")[1]
        (learned,) = (
            r["accuracy"] for r in results["rows"] if r["order"] == measured["order"] and r["after"] == r["on"] == last
        )
        assert measured["forward_transfer"] == pytest.approx(learned - own[last])


class Backwards:
    """An engine that makes every stage's study anew, from what a process is given, and takes the last that is ready."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, study: Study, stages: Sequence[Stage], tell: Told) -> None:
        given, left = json.loads(json.dumps(order(study))), {stage.name: stage for stage in stages}
        while left:
            name = [name for name, stage in left.items() if not set(stage.needs) & left.keys()][-1]
            tell("done", name, made_from(given).run_stage(name))
            self.names.append(name)
            del left[name]


def test_engines_stages_by_name_and_collect_give_the_numbers_of_a_serial_run(tmp_path: Path, toys: None) -> None:
    config = sequence_config(methods=["none"], sequence=FORKED)
    serial = Study(config, tmp_path / "serial").run()
    folder, engine = tmp_path / "parted", Backwards()
    names = [stage.name for stage in Study(config, folder).stages()]
    with pytest.raises(InputError, match="6 of 6 stages are not done"):
        Study(config, folder).collect()
    Study(config, folder).run_stage("sequence-none-photo-art-seed0")
    done = ["source-photo-seed0", "sequence-none-photo-seed0", "sequence-none-photo-art-seed0"]
    results = Study(config, folder).run_on(engine)
    assert sorted(engine.names) == sorted(set(names) - set(done))
    assert without_seconds(results) == without_seconds(serial) == without_seconds(Study(config, folder).collect())


def test_a_search_judges_by_the_mean_over_orders(tmp_path: Path, toys: None) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        """
        image_size = 16
        train_size = 16
        device = "cpu"
        source = {epochs = 1}
        [search]
        sequence = "photo,art;art,photo"
        validation = 0.4
        [[search.trials]]
        method = "none"
        reason = "one"
        """
    )
    record = Search(*read_grid(grid), tmp_path / "out", tiny_data()).run()
    assert record["orders"] == [["photo", "art"], ["art", "photo"]]
    (trial,) = record["trials"]
    ends = [r for r in trial["rows"] if r["position"] == 1 and r["view"] == "shared"]
    assert len(ends) == 4
    assert trial["average"] == pytest.approx(fmean(row["accuracy"] for row in ends))
    assert not {"sequence", "orders", "methods"} & record["settings"].keys()


@pytest.mark.parametrize(
    "given",
    [
        {"sequence": "photo, art; art, P"},
        {"orders": [["photo", "art"], ["art", "photo"]]},
        {"orders": ["photo,art", "art,photo"]},
        {"sequence": ["photo", "art"], "orders": [["photo", "art"], ["art", "photo"]]},
    ],
)
def test_orders_may_be_spelled_in_several_ways_and_are_read_back(given: dict[str, Any], tmp_path: Path) -> None:
    config = from_dict(given, builtin_defaults())
    assert config.in_orders() == (("photo", "art"), ("art", "photo"))
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "c.json") == config
    assert from_dict({"sequence": "sketch,art"}, config).in_orders() == (("sketch", "art"),)
    number = from_dict({"sequence": "photo,art", "orders": 2}, builtin_defaults())
    assert number.in_orders() == config.in_orders()
    assert "orders" not in from_dict({"sequence": "photo,art", "orders": 1}, number).to_dict()
    assert from_dict({"sequence": "photo,art;"}, builtin_defaults()).in_orders() == (("photo", "art"),)


def test_all_domains_in_several_orders_are_those_of_the_data() -> None:
    config = StudyConfig(data="torchvision:CIFAR10", sequence=("all",), methods=("none",), orders=2)
    assert config.with_domains(("a", "b", "c")).in_orders() == (("a", "b", "c"), ("b", "c", "a"))
    many = StudyConfig(data="torchvision:CIFAR10", sequence=("all",), methods=("none",), orders=4)
    with pytest.raises(InputError, match="orders is 4; expected 1 to 3, as many as a,b,c has rotations"):
        many.with_domains(("a", "b", "c"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sequence": "photo,art", "orders": 3}, "orders is 3; expected 1 to 2, as many as photo,art has rotations"),
        ({"sequence": "photo,art", "orders": 0}, "orders is 0; expected 1 to 2"),
        ({"sequence": "photo,art", "orders": "x"}, "orders is 'x'; expected a whole number"),
        ({"sequence": "photo,art;art,sketch"}, "art,sketch has other domains than photo,art"),
        ({"sequence": "photo,art;photo,art"}, "photo,art is among them more than once"),
        ({"sequence": "photo,art;art,photo", "orders": 2}, "has several orders, and orders is given too"),
        ({"sequence": "photo,art", "orders": [["art", "photo"], ["photo", "art"]]}, "the first is art,photo, and seq"),
        ({"orders": 2}, "orders=2 without a sequence"),
    ],
)
def test_orders_that_are_none_are_one_line(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_dict(entries, builtin_defaults())
    assert "\n" not in str(caught.value)
