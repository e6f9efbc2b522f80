"""A sequence from the command line and from files: what is asked for, and one clear line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwm_fast.cli import main
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, TrainOptions
from dwm_fast.pacs.config import DOMAINS, METHODS, StudyConfig, builtin_defaults, from_dict, load_config, real_defaults
from dwm_fast.pacs.sequence import config as sequence_options
from dwm_fast.pacs.sequence.config import SEQUENTIAL

from ..sequence_for_tests import BASE, SEQUENCE, Toy, draw_nothing, offer_toys, sequence_config
from ..study_for_tests import CONFIG, tiny

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_toys(monkeypatch)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ask:
    """Types `dwm-fast ARGUMENTS` in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def typed(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dwm-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return typed


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[StudyConfig]:
    """The configurations that would have been run."""
    found: list[StudyConfig] = []
    monkeypatch.setattr("dwm_fast.pacs.terminal.run_with_progress", lambda config, out: found.append(config))
    return found


def test_alone_is_asked_for_by_a_flag_and_belongs_to_sequences(ask: Ask, configured: list[StudyConfig]) -> None:
    ask("pacs", "sequence", "photo,sketch", "--alone")
    ask("pacs", "sequence", "photo,sketch")
    assert [config.alone for config in configured] == [True, False]
    assert "alone" not in configured[1].to_dict()
    with pytest.raises(InputError, match="alone=True without a sequence"):
        from_dict({"alone": True}, builtin_defaults())


def test_orders_are_asked_for_by_their_number_or_one_by_one(ask: Ask, configured: list[StudyConfig]) -> None:
    ask("pacs", "sequence", "all", "--orders", 3)
    ask("pacs", "sequence", "photo,art; sketch,P")
    ask("pacs", "sequence", "photo,art;art,P")
    ask("pacs", "--sequence", "photo,art;art,P")
    assert [config.in_orders() for config in configured] == [
        (DOMAINS, (*DOMAINS[1:], DOMAINS[0]), (*DOMAINS[2:], *DOMAINS[:2])),
        (("photo", "art"), ("art", "photo")),
        (("photo", "art"), ("art", "photo")),
    ]
    code, out, _ = ask("pacs", "sequence", "photo,art", "--orders", 2, "--methods", "none", "--list-stages")
    assert code == 0
    assert out.splitlines() == [
        "ready\tsource-photo-seed0\t-",
        "ready\tsource-art-seed0\t-",
        "waiting\tsequence-none-photo-seed0\tsource-photo-seed0",
        "waiting\tsequence-none-photo-art-seed0\tsequence-none-photo-seed0",
        "waiting\tsequence-none-art-seed0\tsource-art-seed0",
        "waiting\tsequence-none-art-photo-seed0\tsequence-none-art-seed0",
    ]


def test_a_sequence_runs_to_its_table(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    draw_nothing(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.config.builtin_defaults", lambda: BASE)
    asked = ("pacs", "--sequence", "P,sketch", "--methods", "none,piggyback", "--task-epochs", 2, "--out", "here")
    code, out, err = ask(*asked)
    assert (code, err) == (0, "")
    assert "images: procedural stand-in (not PACS)" in out
    assert "[1/5] network of photo, seed 0: accuracy 0." in out
    assert "[5/5] 2. sketch, piggyback, seed 0: sketch 0." in out
    assert "After the last domain" in out
    assert "report: here/report.html" in out
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    assert results["sequence"] == ["photo", "sketch"]
    assert {t["figures"]["steps"] for t in results["tasks"] if t["position"]} == {2 * 2}
    assert ask(*asked)[0] == 0
    assert ask("pacs", "--config", "here/config.json", "--out", "here")[0] == 0


def test_flags_reach_the_configuration(ask: Ask, configured: list[StudyConfig]) -> None:
    assert ask("pacs", "--sequence", "photo,A,cartoon,sketch", "--seeds", "0,1", "--source-epochs", 7)[0] == 0
    (config,) = configured
    assert (config.sequence, config.methods, config.seeds) == (DOMAINS, SEQUENTIAL, (0, 1))
    assert config.source.epochs == 7
    ask("pacs", "--sequence", "photo,sketch", "--methods", "piggyback-paper,none,packnet", "--task-epochs", 9)
    config = configured[1]
    assert config.methods == ("piggyback-paper", "none", "packnet")
    assert config.sequential == {"piggyback-paper": {"epochs": 9}, "none": {"epochs": 9}}
    assert config.sequential_method("piggyback-paper") == Toy(epochs=9, frozen=True)


def test_without_a_sequence_nothing_is_changed(ask: Ask, configured: list[StudyConfig]) -> None:
    ask("pacs", "--sources", "photo")
    (config,) = configured
    assert (config.sequence, config.methods) == (None, METHODS)
    assert not {"sequence", "sequential"} & config.to_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sequence photo", "sequence: given photo; expected at least two domains, such as photo,art"),
        ("--sequence ,", "sequence: given none; expected at least two domains"),
        ("--sequence photo,art,P", "sequence: photo is in it more than once; expected every domain once"),
        ("--sequence photo,clipart", "clipart"),
        ("--sequence photo,art --methods none,naive", "methods: given none, naive; expected some of none, piggyback"),
        ("--methods piggyback", "methods: given piggyback; expected some of none, naive, edit, binary"),
        ("--sequence photo,art --sources photo", "sequence and sources exclude each other"),
        ("--sequence photo,art --targets art", "sequence and targets exclude each other"),
        ("--sequence photo,art --inits S_end", "sequence and inits exclude each other"),
        ("--sequence photo,art --tune-epochs 0", "sequence and tune exclude each other"),
        ("--sequence photo,art --batch-norm none=frozen", "sequence and tune exclude each other"),
        ("--task-epochs 3", "--task-epochs needs --sequence"),
        ("--sequence photo,art --task-epochs -1", "sequential.none: epochs is -1; expected a whole number"),
        ("--config c.yaml --sources photo", "sequence and sources exclude each other"),
        ("--config pairs.yaml --sequence photo,art", "sequence and sources exclude each other"),
    ],
)
def test_what_is_wrong_is_one_line(ask: Ask, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text("sequence: [photo, art]\n")
    (tmp_path / "pairs.yaml").write_text("sources: photo\n")
    code, out, err = ask("pacs", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


FILE = """
sequence: photo, art, sketch
seeds: [0, 1]
sequential:
  piggyback: {lr: 1e-3, epochs: 3, shares: [0.5, 1]}
  none: {training: {lr: 1e-3}, frozen: true}
"""


def test_a_file_holds_a_sequence_and_the_options_of_its_methods(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FILE)
    config = load_config(tmp_path / "c.yaml")
    assert config.sequence == ("photo", "art", "sketch")
    assert config.methods == SEQUENTIAL
    assert config.sequential_method("piggyback") == Toy(epochs=3, lr=1e-3, frozen=True, shares=(0.5, 1.0))
    plain = config.sequential_method("none")
    assert isinstance(plain, Toy)
    assert (plain.training.lr, plain.training.epochs, plain.frozen) == (1e-3, Toy().training.epochs, True)
    more = from_dict({"sequential": {"none": {"training": {"epochs": 9}}}}, config).sequential_method("none")
    assert isinstance(more, Toy)
    assert (more.training.lr, more.training.epochs, more.frozen) == (1e-3, 9, True)


@pytest.mark.parametrize("changes", [{}, {"sequential": {"none": {"training": {"lr": 0.1}, "shares": [0.25]}}}])
def test_a_written_configuration_is_read_back(changes: dict[str, Any], tmp_path: Path) -> None:
    config = sequence_config(**changes)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "c.json", BASE) == config
    assert not {"sources", "targets", "inits", "tune", "binary", "edit"} & config.to_dict().keys()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sequential": {"magic": {}}}, "sequential: unknown method 'magic'; expected some of none, piggyback"),
        ({"sequential": 3}, "sequential: expected a section for each method"),
        ({"sequential": {"none": {"rate": 1}}}, "sequential.none: unknown entry 'rate'; expected some of epochs, lr"),
        ({"sequential": {"none": {"lr": "fast"}}}, "sequential.none.lr is 'fast'; expected a number"),
        ({"sequential": {"none": {"frozen": "no"}}}, "sequential.none.frozen is 'no'; expected true or false"),
        ({"sequential": {"none": {"shares": ["x"]}}}, "sequential.none.shares is 'x'; expected a number"),
        ({"sequential": {"none": {"shares": 0.5}}}, "sequential.none.shares is 0.5; expected a list"),
        ({"sequential": {"none": {"training": {"lr": -1}}}}, "sequential.none.training: lr is -1.0; expected a rate"),
        ({"sequential": {"none": {"epochs": -2}}}, "sequential.none: epochs is -2; expected a whole number"),
        ({"sequence": "photo,art", "sources": "photo,sketch"}, "sequence and sources exclude each other"),
        ({"sequence": "photo,art", "tune": {"none": {"lr": 1}}}, "sequence and tune exclude each other"),
        ({"sequence": "photo,art", "inits": INITS}, "sequence and inits exclude each other"),
    ],
)
def test_wrong_entries_are_named_in_one_line(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_dict(entries, builtin_defaults())
    assert "\n" not in str(caught.value)


def test_built_in_images_have_options_of_their_own_under_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_options, "BUILTIN", {"none": {"epochs": 4, "training": {"lr": 0.5}}})
    entries = {"sequence": "photo,art", "sequential": {"none": {"training": {"epochs": 2}}}}
    expected = Toy(epochs=4, training=TrainOptions(epochs=2, lr=0.5))
    assert from_dict(entries, builtin_defaults()).sequential_method("none") == expected
    real = from_dict({**entries, "data": "PACS"}, real_defaults())
    assert real.sequential_method("none") == Toy(training=TrainOptions(epochs=2))
    assert from_dict({"data": "PACS"}, from_dict(entries, real_defaults())).sequential == real.sequential


def test_a_configuration_built_in_python_is_held_to_the_same() -> None:
    assert sequence_config().domains() == SEQUENCE
    assert CONFIG.domains() == ("photo", "sketch")
    with pytest.raises(InputError, match="sequence and sources exclude each other"):
        StudyConfig(sequence=("photo", "art"), methods=("none",), sources=("photo", "sketch"))


@pytest.fixture
def real_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods and options there are, not the toys."""
    monkeypatch.undo()


def test_every_default_method_takes_its_options_for_built_in_images_and_epochs(real_methods: None) -> None:
    config = from_dict({"sequence": "photo,art"}, builtin_defaults())
    assert config.methods == SEQUENTIAL
    for name in SEQUENTIAL:
        method, nine = config.sequential_method(name), config.with_task_epochs(9).sequential_method(name)
        assert method != from_dict({"data": "x", "sequence": "photo,art"}, real_defaults()).sequential_method(name)
        assert "'epochs': 9" in str(dataclasses.asdict(nine)), name  # type: ignore[call-overload]
    paper = from_dict({"sequence": "photo,art", "methods": "piggyback-paper"}, builtin_defaults())
    assert dataclasses.asdict(paper.sequential_method("piggyback-paper"))["options"]["lr"] == 1e-4  # type: ignore[call-overload]


def test_the_command_sequence_and_the_old_flag_ask_for_the_same(ask: Ask, configured: list[StudyConfig]) -> None:
    ask("pacs", "sequence", "photo,A,sketch", "--seeds", "0,1", "--methods", "none,packnet", "--task-epochs", 9)
    ask("pacs", "--sequence", "photo,A,sketch", "--seeds", "0,1", "--methods", "none,packnet", "--task-epochs", 9)
    assert configured[0] == configured[1]
    assert configured[0].sequence == ("photo", "art", "sketch")
    assert configured[0].sequential == {"none": {"epochs": 9}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sequence photo,art --sources photo", "No such option"),
        ("sequence photo,art --tune-epochs 3", "No such option"),
        ("sequence", "Missing argument"),
        ("sequence photo", "sequence: given photo; expected at least two domains"),
        ("sequence photo,clipart", "clipart"),
        ("sequence photo,art --methods naive", "methods: given naive; expected some of none, piggyback"),
        ("--seeds 1 sequence photo,art", "--seeds stands before 'sequence'; give the options after it"),
    ],
)
def test_a_wrong_command_of_a_sequence_is_one_line(ask: Ask, tmp_path: Path, arguments: str, message: str) -> None:
    code, out, err = ask("pacs", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_help_of_a_sequence_offers_what_it_reads_and_nothing_else(ask: Ask) -> None:
    code, out, _ = ask("pacs", "sequence", "--help")
    assert code == 0
    assert "Usage: dwm-fast pacs sequence" in out
    for option in ("--task-epochs", "--methods", "--source-lr", "--out"):
        assert option in out
    for option in ("--sources", "--tune-lr", "--mask-epochs", "--batch-norm"):
        assert option not in out


def test_a_search_and_its_settings_from_the_command_line(
    ask: Ask, configured: list[StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    (tmp_path / "grid.toml").write_text(
        """
        image_size = 16
        train_size = 16
        source = {epochs = 1}
        [search]
        sequence = ["photo", "sketch"]
        validation = 0.4
        [[search.trials]]
        method = "none"
        reason = "two rates"
        lr = [0.1, 0.2]
        """
    )
    code, out, err = ask("pacs", "search", "grid.toml", "--out", "s", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "[2/2] none {'lr': 0.2}, after sketch: sketch 0." in out
    assert "test images are not read" in out
    assert "'dwm-fast pacs sequence photo,sketch --settings s/search.json' takes the choice" in out
    record = json.loads((tmp_path / "s" / "search.json").read_text())
    chosen = record["trials"][record["chosen"]["none"]]["settings"]["lr"]
    ask("pacs", "sequence", "photo,art", "--settings", "s/search.json", "--validation", 0.3)
    ask("pacs", "sequence", "photo,art", "--settings", "s/search.json", "--task-epochs", 4)
    assert [c.sequential["none"] for c in configured] == [{"lr": chosen}, {"lr": chosen, "epochs": 4}]
    assert [c.validation for c in configured] == [0.3, None]
    code, _, err = ask("pacs", "--settings", "s/search.json")
    assert code == 2
    assert "chose settings for sequences, and this is a study of pairs" in err
