"""A search chooses on validation images by a rule that is told, resumes, and never reads a test image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dwm_fast.errors import InputError
from dwm_fast.methods import load_method, registry
from dwm_fast.pacs import lab, search
from dwm_fast.pacs.config import builtin_defaults, from_dict
from dwm_fast.pacs.data import load_pacs, validation_part
from dwm_fast.pacs.pairs.search import choose
from dwm_fast.pacs.search import Search, read_grid, read_settings
from dwm_fast.pacs.study import Study

from ..pacs_for_tests import write_lists, write_tree
from ..study_for_tests import tiny, tiny_data, without_seconds

GRID = """
image_size = 16
train_size = 16
batch_size = 16
device = "cpu"
source = {epochs = 1, lr = 1e-2}

[search]
pairs = ["photo->sketch"]
validation = 0.34

[[search.trials]]
method = "none"
reason = "rates and a pull toward the start"
"tune.epochs" = 1
"tune.lr" = [1e-2, 1e-3]
"tune.start_decay" = 0.1

[[search.trials]]
method = "binary"
init = ["S_end", "S_start"]
reason = "does a mask help at all"
"binary.epochs" = 1
"binary.coefficient" = 0.01
"tune.epochs" = 1
"""


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)


def grid_file(folder: Path, text: str = GRID) -> Path:
    file = folder / "grid.toml"
    file.write_text(text)
    return file


def real_images(root: Path) -> Path:
    write_tree(root)
    write_lists(root / "splits")
    return root


def found(grid: Path, data: Path | None, out: Path) -> dict[str, Any]:
    flags = {} if data is None else {"data": str(data), "backbone": "small"}
    return without_seconds(Search(*read_grid(grid, flags), out).run())  # type: ignore[no-any-return]


def test_without_the_crossval_images_and_lists_a_search_runs_unchanged(tmp_path: Path) -> None:
    """Their files are removed, or replaced by what no decoder reads: the record stays the same."""
    grid, data = grid_file(tmp_path), real_images(tmp_path / "pacs")
    before = found(grid, data, tmp_path / "a")
    crossval = [data / line.split()[0] for f in data.glob("splits/*_crossval_*") for line in f.read_text().splitlines()]
    assert len(crossval) == 4 * 7
    for file in crossval:
        file.write_bytes(b"no image")
    assert found(grid, data, tmp_path / "b") == before
    for file in [*crossval, *data.glob("splits/*_crossval_*")]:
        file.unlink()
    assert found(grid, data, tmp_path / "c") == before
    assert [trial["status"] for trial in before["trials"]] == ["done"] * 4


def test_a_validation_part_is_stratified_seeded_and_of_the_train_list_alone(tmp_path: Path) -> None:
    data = real_images(tmp_path)
    for domain in load_pacs(data, image_size=8, validation=0.34).domains.values():
        assert sorted(domain.labels[domain.test].tolist()) == list(range(7))
        assert sorted([*domain.train.tolist(), *domain.test.tolist()]) == list(range(7 * 3))
        assert not [n for n in domain.names if n.endswith("_3.png")]  # the crossval images
    held = [
        [d.names[i] for d in load_pacs(data, image_size=8, validation=0.34, seed=seed).domains.values() for i in d.test]
        for seed in (0, 0, 1)
    ]
    assert held[0] == held[1] != held[2]


def test_in_memory_the_validation_part_holds_no_test_image() -> None:
    whole, part = tiny_data(), validation_part(tiny_data(), 0.4)
    for old, new in zip(whole.domains.values(), part.domains.values(), strict=True):
        assert new.names == [old.names[i] for i in old.train]
        assert torch.equal(new.images, old.images[old.train])
        assert torch.bincount(new.labels[new.test]).tolist() == [2] * 7  # round(0.4 * 5)
    assert part.fingerprint != whole.fingerprint
    assert part.name != whole.name


def test_a_stopped_search_goes_on_and_gives_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_file(tmp_path)
    whole = found(grid, None, tmp_path / "whole")
    cut = Search(*read_grid(grid), tmp_path / "cut")

    def stop(text: str) -> None:
        if text.startswith("[3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(stop)
    kept = json.loads((tmp_path / "cut" / search.RECORD).read_text())
    assert (kept["pending"], kept["trials"][0]["status"]) == (2, "done")
    with pytest.raises(InputError, match="2 of 4 trials are still to do"):
        read_settings(tmp_path / "cut" / search.RECORD)

    trained = []
    monkeypatch.setattr(lab, "train", lambda *a, **k: trained.append(a))
    assert found(grid, None, tmp_path / "cut") == whole
    assert not trained  # the source network of the first half is read


def test_the_study_takes_the_choice_and_reports_on_test_images(tmp_path: Path) -> None:
    record = found(grid_file(tmp_path), None, tmp_path)
    config = from_dict(read_settings(tmp_path / search.RECORD), builtin_defaults())
    chosen = record["trials"][record["chosen"]["none"]]
    assert config.tune["none"][0].lr == chosen["settings"]["tune.lr"]
    assert config.tune["none"][0].start_decay == 0.1
    assert config.binary.coefficient == 0.01
    assert (config.validation, config.sources, config.image_size) == (None, builtin_defaults().sources, 16)
    grid = {"sources": "photo", "targets": "sketch", "methods": ["none"], "device": "cpu"}
    study = Study(from_dict(grid, config), tmp_path / "study", tiny_data())
    assert len(study.data.domains["sketch"].test) == 7 * 2


def trial(method: str, source: float, target: float, status: str = "done") -> dict[str, Any]:
    return {"method": method, "source_after": source, "target_after": target, "status": status}


def test_the_choice_keeps_the_source_best_among_those_that_reach_the_target() -> None:
    trials = [
        trial("none", 0.3, 0.90),
        trial("none", 0.4, 0.895),  # within 0.01 of the best none, and better on the source
        trial("none", 0.9, 0.5),
        trial("naive", 0.8, 0.6),
        trial("naive", 0.7, 0.7),  # none reaches the target: the nearest
        trial("binary", 0.6, 0.89),
        trial("binary", 0.7, 0.91),
        trial("binary", 0.99, 0.88),
        {"method": "edit", "status": "failed"},
    ]
    assert choose(trials, 0.0101) == {"none": 1, "naive": 4, "binary": 6}
    assert choose([trial("binary", 1, 1)], 0.1) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('method = "none"', 'method = "naive"'), "no trial of none"),
        (('reason = "does', '#reason = "does'), "no reason"),
        (("photo->sketch", "photo"), "expected 'photo->sketch'"),
        (('"binary.epochs"', '"edit.epochs"'), "a trial of binary sets edit.epochs"),
        (('"binary.coefficient"', '"binary"'), "a trial of binary sets binary;"),
        (
            ('method = "binary"', 'method = "magic"'),
            "unknown method 'magic'; expected some of none, naive, edit, binary",
        ),
        (('"S_start"', '"start"'), "init is 'start'"),
        (("validation = 0.34", "validation = 1.5"), "validation is 1.5"),
        (("validation = 0.34", "fraction = 0.3"), "unknown entry 'fraction'"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_one_clear_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(*read_grid(grid_file(tmp_path, GRID.replace(*change))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    record = found(grid_file(tmp_path, GRID.replace("[1e-2, 1e-3]", "[1e30, 1e-3]")), None, tmp_path)
    assert [t["status"] for t in record["trials"]] == ["failed", "done", "done", "done"]
    assert "not finite" in record["trials"][0]["error"]
    assert record["chosen"]["none"] == 1


def test_a_trial_is_one_way_of_fine_tuning_also_where_the_defaults_have_several(tmp_path: Path) -> None:
    """By default binary masks are tuned in two ways; a trial that names none of their settings runs the first."""
    assert len(builtin_defaults().tune["binary"]) > 1
    text = GRID.replace('"binary.coefficient" = 0.01\n"tune.epochs" = 1', '"binary.coefficient" = 0.01')
    config, grid = read_grid(grid_file(tmp_path, text))
    tried = Search(config, grid, tmp_path / "run", data=tiny_data())
    for trial, tries in zip(grid.trials, tried.labs, strict=True):
        first = builtin_defaults().tune[trial.method][0]
        assert [way.kept_decay for way in tries.config.tune[trial.method]] == [first.kept_decay]
        assert all(len(tries.tune_stages(run)) == 1 for run in tried._runs(trial))


OTHERS = """
[[search.trials]]
method = "lottery-ticket"
reason = "how much one round prunes"
"lottery-ticket.rounds" = 1
"lottery-ticket.prune" = [0.5, 0.75]
"tune.epochs" = 1

[[search.trials]]
method = "OWN:Odd"
reason = "one of our own"
"odd.of.every" = [2, 3]
"tune.epochs" = 1
"""

OWN = """
from dataclasses import dataclass, field

import torch
from dwm_fast.methods import FoundMask
from dwm_fast.nn import maskable_weights

@dataclass(frozen=True)
class Places:
    every: int = 1

@dataclass(frozen=True)
class Odd:
    of: Places = field(default_factory=Places)
    name = "odd"

    def find(self, model, task):
        shapes = {name: layer.weight.shape for name, layer in maskable_weights(model).items()}
        every = self.of.every
        return FoundMask({name: (torch.arange(s.numel()) % every == 0).view(s) for name, s in shapes.items()})
"""


@pytest.fixture
def with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The grid with a registered method and one of a file of its own."""
    monkeypatch.setattr(registry, "_registered", {})
    (tmp_path / "own.py").write_text(OWN)
    return GRID + OTHERS.replace("OWN", str(tmp_path / "own.py"))


def test_registered_methods_and_those_of_a_file_are_searched_too(tmp_path: Path, with_others: str) -> None:
    record = found(grid_file(tmp_path, with_others), None, tmp_path / "out")
    kept = [trial["fraction_kept"] for trial in record["trials"] if trial["method"] in ("lottery-ticket", "odd")]
    assert kept == pytest.approx([1 / 2, 1 / 4, 1 / 2, 1 / 3], abs=0.01)
    assert list(record["chosen"]) == ["none", "binary", "lottery-ticket", "odd"]
    every = record["trials"][record["chosen"]["odd"]]["settings"]["odd.of.every"]
    registry._registered.clear()  # as in the process that reads the choice
    load_method.cache_clear()
    config = from_dict(
        {**read_settings(tmp_path / "out" / "search.json"), "methods": ["none", "odd"]}, builtin_defaults()
    )
    odd: Any = config.pair_method("odd")
    assert odd.of.every == every


def test_a_trial_names_a_method_that_the_file_loads_beside_one_that_it_loads_itself(
    tmp_path: Path, with_others: str
) -> None:
    (tmp_path / "even.py").write_text(OWN.replace("Odd", "Even").replace('"odd"', '"even"'))
    named = with_others.replace(f"{tmp_path}/own.py:Odd", "odd") + OTHERS.replace("OWN", f"{tmp_path}/even").replace(
        "odd", "even"
    ).replace("even:Odd", "even.py:Even")
    config, grid = read_grid(grid_file(tmp_path, f'own_methods = ["{tmp_path}/own.py:Odd"]\n{named}'))
    assert {trial.method for trial in grid.trials} == {"none", "binary", "lottery-ticket", "odd", "even"}
    assert config.own_methods == (f"{tmp_path}/own.py:Odd", f"{tmp_path}/even.py:Even")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("odd.of.every", "of.every"), "a trial of odd sets of.every; expected tune.*, odd.*, deviations"),
        (('"odd.of.every" = [2, 3]', '"odd.of" = 1\n"odd.of.every" = 2'), "a trial of odd sets of.every and of too"),
        (("lottery-ticket.prune", "lottery-ticket.share"), "pairwise.lottery-ticket: unknown entry 'share'"),
        (("own.py:Odd", "own.py:Even"), "Even"),
    ],
)
def test_options_of_other_methods_are_checked(
    tmp_path: Path, with_others: str, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Search(*read_grid(grid_file(tmp_path, with_others.replace(*change))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
