"""A search over sequences chooses on validation images by a rule that is told, resumes, and reads no test image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dwm_fast.errors import InputError
from dwm_fast.pacs import search
from dwm_fast.pacs.config import builtin_defaults, from_dict
from dwm_fast.pacs.search import Search, read_grid, read_settings
from dwm_fast.pacs.sequence import SequenceStudy
from dwm_fast.pacs.sequence.lab import SequenceLab
from dwm_fast.pacs.sequence.search import choose

from ..pacs_for_tests import write_lists, write_tree
from ..sequence_for_tests import Toy, draw_nothing, offer_toys
from ..study_for_tests import stages, tiny, tiny_data, without_seconds

GRID = """
image_size = 16
train_size = 16
batch_size = 16
device = "cpu"
seeds = [0]
source = {epochs = 1, lr = 1e-2}
sequential.none.training.epochs = 7

[search]
sequence = ["photo", "sketch", "art"]
validation = 0.34

[[search.trials]]
method = "none"
reason = "a rate, and one that forgets less"
lr = [0.1, 1e-4]
training.lr = 1e-3

[[search.trials]]
method = "piggyback"
reason = "heads alone"
"shares" = [[0.25, 0.5]]
"""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    offer_toys(monkeypatch)
    draw_nothing(monkeypatch)


def grid_file(folder: Path, text: str = GRID) -> Path:
    file = folder / "grid.toml"
    file.write_text(text)
    return file


def found(grid: Path, data: Path | None, out: Path) -> dict[str, Any]:
    flags = {} if data is None else {"data": str(data), "backbone": "small"}
    return without_seconds(Search(*read_grid(grid, flags), out).run())  # type: ignore[no-any-return]


def test_without_the_crossval_images_and_lists_a_search_runs_unchanged(tmp_path: Path) -> None:
    """Their files are replaced by what no decoder reads, then removed: the record stays the same."""
    grid, data = grid_file(tmp_path), tmp_path / "pacs"
    write_tree(data)
    write_lists(data / "splits")
    before = found(grid, data, tmp_path / "a")
    crossval = [data / line.split()[0] for f in data.glob("splits/*_crossval_*") for line in f.read_text().splitlines()]
    assert len(crossval) == 4 * 7
    for file in crossval:
        file.write_bytes(b"no image")
    assert found(grid, data, tmp_path / "b") == before
    for file in [*crossval, *data.glob("splits/*_crossval_*")]:
        file.unlink()
    assert found(grid, data, tmp_path / "c") == before
    assert [trial["status"] for trial in before["trials"]] == ["done"] * 3


def test_a_record_has_every_trial_with_its_reason_and_measures(tmp_path: Path) -> None:
    record = found(grid_file(tmp_path), None, tmp_path)
    assert json.loads((tmp_path / search.RECORD).read_text())["format"] == record["format"] == 1
    assert (record["kind"], record["sequence"], record["pending"]) == ("search", ["photo", "sketch", "art"], 0)
    tried = [(t["method"], t["settings"]) for t in record["trials"]]
    assert tried == [
        ("none", {"lr": 0.1, "training.lr": 1e-3}),
        ("none", {"lr": 1e-4, "training.lr": 1e-3}),
        ("piggyback", {"shares": [0.25, 0.5]}),
    ]
    for trial in record["trials"]:
        last = {r["on"]: r["accuracy"] for r in trial["rows"] if r["after"] == "art" and r["view"] == "shared"}
        assert trial["reason"]
        assert trial["final"] == last
        assert trial["average"] == pytest.approx(sum(last.values()) / 3)
    assert record["trials"][2]["forgetting"] == 0  # its weights are frozen


def test_a_stopped_search_goes_on_and_gives_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_file(tmp_path)
    whole = found(grid, None, tmp_path / "whole")
    cut = Search(*read_grid(grid), tmp_path / "cut")

    def stop(text: str) -> None:
        if text.startswith("[2/3]") and "after sketch" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop)
    kept = json.loads((tmp_path / "cut" / search.RECORD).read_text())
    assert (kept["pending"], kept["trials"][0]["status"]) == (2, "done")
    with pytest.raises(InputError, match="2 of 3 trials are still to do"):
        read_settings(tmp_path / "cut" / search.RECORD, of_sequence=True)

    there, learned = stages(tmp_path / "cut"), []
    learn = SequenceLab._learn
    monkeypatch.setattr(SequenceLab, "_learn", lambda *cell: learned.append(cell[1:]) or learn(*cell))
    assert found(grid, None, tmp_path / "cut") == whole
    assert len(there) == 1 + 3 + 2
    assert learned == [("none", 2, 0), *(("piggyback", position, 0) for position in range(3))]
    assert stages(tmp_path / "cut") == stages(tmp_path / "whole")


def test_trials_draw_the_same_random_numbers(tmp_path: Path) -> None:
    """A trial's figures do not depend on the others beside it."""
    whole = found(grid_file(tmp_path), None, tmp_path / "whole")
    alone = found(grid_file(tmp_path, GRID.replace("[0.1, 1e-4]", "1e-4")), None, tmp_path / "alone")
    assert alone["trials"] == whole["trials"][1:]


def test_the_study_takes_the_choice_and_reports_on_test_images(tmp_path: Path) -> None:
    record = found(grid_file(tmp_path), None, tmp_path)
    settings = read_settings(tmp_path / search.RECORD, of_sequence=True)
    config = from_dict({"sequence": "art,photo", "methods": "none"}, from_dict(settings, builtin_defaults()))
    method = config.sequential_method("none")
    assert isinstance(method, Toy)
    assert method.lr == record["trials"][record["chosen"]["none"]]["settings"]["lr"]
    assert (method.training.epochs, method.training.lr) == (7, 1e-3)
    assert config.sequential_method("piggyback").shares == (0.25, 0.5)  # type: ignore[attr-defined]
    assert (config.validation, config.image_size, config.source.epochs) == (None, 16, 1)
    study = SequenceStudy(config, tmp_path / "study", tiny_data())
    assert len(study.data.domains["art"].test) == 7 * 2


def test_a_choice_for_pairs_is_none_for_sequences(tmp_path: Path) -> None:
    found(grid_file(tmp_path), None, tmp_path)
    with pytest.raises(InputError, match="chose settings for sequences, and this is a study of pairs"):
        read_settings(tmp_path / search.RECORD)
    pairs = Path(__file__).parents[3] / "docs/results/search.json"
    assert read_settings(pairs)["image_size"] == 64
    with pytest.raises(InputError, match="chose settings for pairs, and this is a study of sequences"):
        read_settings(pairs, of_sequence=True)


def trial(method: str, average: float, forgetting: float, status: str = "done") -> dict[str, Any]:
    return {"method": method, "average": average, "forgetting": forgetting, "status": status}


def test_the_choice_is_the_highest_average_and_of_equals_the_one_that_forgets_least() -> None:
    trials = [
        trial("none", 0.3, 0.1),
        trial("none", 0.5, 0.4),
        trial("none", 0.5, 0.2),
        trial("none", 0.5, 0.2),
        trial("spg", 0.495, 0.0),
        trial("spg", 0.5, 0.1),
        {"method": "ksm", "status": "failed"},
    ]
    assert choose(trials) == {"none": 2, "spg": 5}
    assert choose(trials, 0.0051) == {"none": 2, "spg": 4}
    assert choose(trials[6:]) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"photo", "sketch", "art"', '"photo"'), "sequence: given photo; expected at least two domains"),
        (('method = "none"', 'method = "naive"'), "unknown method 'naive'; expected some of none, piggyback"),
        (('reason = "heads', '#reason = "heads'), "no reason"),
        (("lr = [0.1, 1e-4]", "rate = [0.1, 1e-4]"), "sequential.none: unknown entry 'rate'; expected some of epochs"),
        (("lr = [0.1, 1e-4]", "lr = -1\n'lr.x' = 3"), "a trial of none sets lr.x and lr too"),
        (('"shares" = [[0.25, 0.5]]', '"shares" = [0.25, 0.5]'), "shares is 0.25; expected a list"),
        (("validation = 0.34", "validation = 1.5"), "validation is 1.5"),
        (("validation = 0.34", 'pairs = ["photo->sketch"]'), "unknown entry 'pairs'; expected trials, sequence"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_one_clear_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(*read_grid(grid_file(tmp_path, GRID.replace(*change))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    record = found(grid_file(tmp_path, GRID.replace("[0.1, 1e-4]", "[1e30, 1e-4]")), None, tmp_path)
    assert [t["status"] for t in record["trials"]] == ["failed", "done", "done"]
    assert "not finite" in record["trials"][0]["error"]
    assert record["chosen"] == {"none": 1, "piggyback": 2}
