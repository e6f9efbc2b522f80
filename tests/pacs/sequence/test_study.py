"""A sequence of domains: what is measured and written, and that an interrupted one ends as one that was not."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwm_fast.errors import InputError
from dwm_fast.pacs.backbones import last_linear
from dwm_fast.pacs.config import from_dict
from dwm_fast.pacs.sequence import SequenceStudy
from dwm_fast.pacs.sequence.lab import SequenceLab

from ..killing import Runner
from ..sequence_for_tests import BASE, SEQUENCE, draw_nothing, offer_toys, sequence_config
from ..study_for_tests import stages, tiny, tiny_data, without_seconds

SOURCE = "source-photo-seed0"
TASKS = ["sequence-none-photo-seed0", "sequence-none-photo-sketch-seed0", "sequence-none-photo-sketch-art-seed0"]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    offer_toys(monkeypatch)
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    """The folder of a whole sequence with two methods and seeds, its results, and what progress was told."""
    folder = tmp_path_factory.mktemp("sequence")
    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch)
        offer_toys(patch)
        results = SequenceStudy(sequence_config(seeds=[0, 1]), folder).run(lambda *args: told.append(args))
    return folder, results, told


def make_lab(folder: Path, **changes: Any) -> SequenceLab:
    return SequenceLab(sequence_config(**changes), tiny_data(), folder, torch.device("cpu"))


def tensors(folder: Path, name: str) -> int:
    """Number of tensors that a stage's file holds."""
    content = (folder / "stages" / f"{name}.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return len(header.keys() - {"__metadata__"})


def test_results_have_the_documented_entries(finished: Any, toys: None) -> None:
    folder, results, _ = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert (results["format"], results["kind"], results["sequence"]) == (1, "sequence", list(SEQUENCE))
    assert set(results) == {
        "format",
        "kind",
        "data",
        "config",
        "versions",
        "sequence",
        "methods",
        "sources",
        "tasks",
        "rows",
        "measures",
    }
    assert from_dict(results["config"], BASE) == sequence_config(seeds=[0, 1])
    assert results["config"] == json.loads((folder / "config.json").read_text())
    assert set(results["methods"]) == {"none", "piggyback"}
    assert results["methods"]["piggyback"]["frozen"] is True
    assert [(s["source"], s["seed"]) for s in results["sources"]] == [("photo", 0), ("photo", 1)]
    assert all(
        set(t) == {"method", "seed", "position", "domain", "bits", "seconds", "figures"} for t in results["tasks"]
    )


def test_with_alone_each_domain_has_a_network_of_its_own_and_measures_the_forward_transfer(
    tmp_path: Path, toys: None
) -> None:
    study = SequenceStudy(sequence_config(methods=["none"], alone=True), tmp_path)
    assert [stage.name for stage in study.stages()][:3] == [f"source-{domain}-seed0" for domain in SEQUENCE]
    results = study.run()
    own = {one["source"]: one["accuracy"] for one in results["alone"]}
    assert list(own) == ["sketch", "art"]
    learned = {r["on"]: r["accuracy"] for r in results["rows"] if r["after"] == r["on"] and r["view"] == "shared"}
    expected = sum(learned[domain] - own[domain] for domain in ("sketch", "art")) / 2
    (measured,) = (m for m in results["measures"] if m["view"] == "shared")
    assert measured["forward_transfer"] == pytest.approx(expected)
    assert "forward transfer" in (tmp_path / "table.md").read_text()
    assert "trained on it alone" in (tmp_path / "report.html").read_text()
    assert results["config"]["alone"] is True
    assert len(results["sources"]) == 1


def test_after_every_task_every_domain_seen_is_evaluated_in_every_view(finished: Any) -> None:
    rows = finished[1]["rows"]
    cells = [(r["method"], r["seed"], r["view"], r["after"], r["on"]) for r in rows]
    pairs = [(after, on) for i, after in enumerate(SEQUENCE) for on in SEQUENCE[: i + 1]]
    views = [("none", "shared"), ("none", "masked"), ("piggyback", "shared")]
    assert sorted(cells) == sorted((m, k, v, a, o) for m, v in views for k in (0, 1) for a, o in pairs)
    assert all(SEQUENCE[r["position"]] == r["after"] and 0 <= r["accuracy"] <= 1 for r in rows)


def test_every_method_begins_from_the_network_of_the_first_domain(finished: Any) -> None:
    results = finished[1]
    trained = {s["seed"]: s["accuracy"] for s in results["sources"]}
    first = [r for r in results["rows"] if r["position"] == 0]
    assert len(first) == 6
    assert all(r["accuracy"] == trained[r["seed"]] for r in first)


def test_a_domain_under_its_own_network_stays_to_the_last_image(finished: Any) -> None:
    rows = [r for r in finished[1]["rows"] if r["view"] == "masked" or r["method"] == "piggyback"]
    learned = {(r["method"], r["seed"], r["on"]): r["accuracy"] for r in rows if r["after"] == r["on"]}
    assert all(r["accuracy"] == learned[r["method"], r["seed"], r["on"]] for r in rows)
    kept = [m for m in finished[1]["measures"] if m["view"] == "masked" or m["method"] == "piggyback"]
    assert [(m["forgetting"], m["backward_transfer"]) for m in kept] == [(0, 0)] * 4


def test_bits_are_those_stored_when_the_sequence_has_ended(finished: Any) -> None:
    results = finished[1]
    assert {t["domain"]: t["bits"] for t in results["tasks"]} == {"photo": 0, "sketch": 300, "art": 300}
    assert {(m["bits_added"], m["bits_total"]) for m in results["measures"]} == {(300, 600)}


def test_folder_holds_tables_with_a_line_a_row_figures_and_report(finished: Any) -> None:
    folder, results, _ = finished
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"])
    assert float(lines[3]["accuracy"]) == results["rows"][3]["accuracy"]
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["method"], line["view"]) for line in table] == [
        ("none", "shared"),
        ("none", "masked"),
        ("piggyback", "shared"),
    ]
    assert "procedural stand-in (not PACS)" in (folder / "table.md").read_text()
    assert len(list((folder / "figures").iterdir())) == 6
    assert "Domain after domain" in (folder / "report.html").read_text()


def test_progress_counts_up_to_the_number_of_stages(finished: Any) -> None:
    folder, _, told = finished
    total = 2 * (1 + 2 * 3)
    assert {t[1] for t in told} == {total}
    assert len(stages(folder)) == total
    assert [t[0] for t in told if t[3] is not None] == list(range(1, total + 1))
    assert told[-1][3].startswith("art 0.")


def test_a_finished_task_keeps_its_state_only_until_the_next(finished: Any) -> None:
    folder = finished[0]
    assert [tensors(folder, name) > 0 for name in TASKS] == [False, False, True]


class Stop(Exception):
    """Stands for whatever ends a process."""


def test_stopped_after_every_stage_it_ends_with_the_same_results(finished: Any, tmp_path: Path, toys: None) -> None:
    config = sequence_config(seeds=[0, 1])

    def stop(done: int, total: int, stage: Any, says: str | None) -> None:
        if says is not None and done > ran:
            raise Stop

    ran = 0
    results = None
    while results is None:
        try:
            results = SequenceStudy(config, tmp_path).run(stop)
        except Stop:
            ran += 1
            torch.rand(ran)  # the state of the process does not enter
    assert ran == 14
    assert without_seconds(results) == without_seconds(finished[1])
    for name in stages(tmp_path):
        assert tensors(tmp_path, name) == tensors(finished[0], name), name


def test_killed_within_a_stage_it_ends_with_the_same_results(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = Runner("tests.pacs.sequence_for_tests")
    try:
        assert run(whole) == 0
        assert run(killed, kill_after=".locks/study.json") == signal.SIGKILL
        assert stages(killed) == []
        for number in (1, 2):
            assert run(killed, kill_after=f"stages/{TASKS[number - 1]}.safetensors") == signal.SIGKILL
            assert stages(killed) == sorted([SOURCE, *TASKS[:number]])
        assert run(killed) == 0
    finally:
        run.close()
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    assert without_seconds(results[0]) == without_seconds(results[1])


@pytest.mark.parametrize("broken", [TASKS[1], TASKS[2]])
def test_a_lost_stage_whose_start_was_not_kept_is_done_again(broken: str, tmp_path: Path, toys: None) -> None:
    config = sequence_config(methods=["none"])
    whole = SequenceStudy(config, tmp_path).run()
    (tmp_path / "stages" / f"{broken}.safetensors").write_bytes(b"broken")
    again = SequenceStudy(config, tmp_path).run()
    assert without_seconds(again) == without_seconds(whole)
    assert [tensors(tmp_path, name) > 0 for name in TASKS] == [False, False, True]


def test_a_learner_taken_from_the_folder_answers_as_it_was_measured(tmp_path: Path, toys: None) -> None:
    lab = make_lab(tmp_path)
    rows = lab.learned("none", 2, 0)["rows"]
    again = make_lab(tmp_path)
    for position in (2, 1):  # the state of the second is no longer kept: it is learned again
        learner = again.learner("none", position, 0)
        measured = make_lab(tmp_path).learned("none", position, 0)["rows"]
        assert [again.evaluate(learner.network(r["on"], r["view"]), r["on"])[0] for r in measured] == [
            r["accuracy"] for r in measured
        ]
    assert rows == make_lab(tmp_path).learned("none", 2, 0)["rows"]


def test_a_longer_sequence_goes_on_from_a_shorter_one(tmp_path: Path, toys: None) -> None:
    short = SequenceStudy(sequence_config(sequence=SEQUENCE[:2], methods=["none"]), tmp_path).run()
    times = {name: (tmp_path / "stages" / f"{name}.safetensors").stat().st_mtime_ns for name in (SOURCE, TASKS[0])}
    long = SequenceStudy(sequence_config(methods=["none"]), tmp_path).run()
    assert long["rows"][: len(short["rows"])] == short["rows"] or sorted(map(str, short["rows"])) == sorted(
        str(r) for r in long["rows"] if r["position"] < 2
    )
    assert times == {name: (tmp_path / "stages" / f"{name}.safetensors").stat().st_mtime_ns for name in times}


def test_methods_see_the_same_batches_and_draw_from_seeds_of_their_own(tmp_path: Path, toys: None) -> None:
    lab = make_lab(tmp_path)
    one, other = lab.task("art", 0, 1), lab.task("art", 0, 2)
    assert (one.seed, other.seed) == (1, 2)
    pairs = zip(one.batches(0), other.batches(0), strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
    assert not torch.equal(next(one.batches(0))[0], next(one.batches(1))[0])
    assert not torch.equal(next(one.batches(0))[0], next(lab.task("art", 1, 1).batches(0))[0])
    assert one.steps_per_epoch == len(list(one.batches(0)))


def test_a_tasks_loss_never_sees_a_test_image(tmp_path: Path, toys: None) -> None:
    lab = make_lab(tmp_path)
    images = lab.data.domains["art"]
    seen: list[int] = []

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.zeros(len(x), 7)

    assert lab.task("art", 0, 0).loss(Counts()) == pytest.approx(torch.tensor(7.0).log().item())
    assert sum(seen) == len(images.train)
    assert not set(images.train.tolist()) & set(images.test.tolist())


def test_other_settings_are_refused_before_anything_is_done(tmp_path: Path, toys: None) -> None:
    make_lab(tmp_path).learned("none", 1, 0)
    before = stages(tmp_path)
    cases = {
        r"none.epochs: 1 there, 2 now": {"sequential": {"none": {"epochs": 2}}},
        r"none.training.lr: 0.0003 there, 0.1 now": {"sequential": {"none": {"training": {"lr": 0.1}}}},
        r"batch_size: 16 there, 8 now": {"batch_size": 8},
    }
    for named, changes in cases.items():
        with pytest.raises(InputError, match=f"was made with other settings .*{named}.*--out") as caught:
            SequenceStudy(sequence_config(**changes), tmp_path, tiny_data())
        assert "\n" not in str(caught.value)
    SequenceStudy(sequence_config(sequential={"piggyback": {"epochs": 5}}), tmp_path, tiny_data())
    assert stages(tmp_path) == before


def test_a_network_that_does_not_end_in_a_linear_layer_is_named() -> None:
    assert last_linear(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(1, 1))) == "2"
    with pytest.raises(InputError, match=r"Sequential does not end in a Linear layer.*choose another --backbone"):
        last_linear(nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1)))
