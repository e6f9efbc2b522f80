"""The command line as a new user meets it: help that reads well, and one clear line for whatever is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dwm_fast
from dwm_fast.cli import main
from dwm_fast.pacs.config import StudyConfig, builtin_defaults, real_defaults

from .pacs.pacs_for_tests import png, write_lists, write_parquet, write_tree
from .pacs.study_for_tests import CONFIG, NarrowNet, stages, tiny

Answer = tuple[int, str, str]
Ask = Callable[..., Answer]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ask:
    """Types `dwm-fast ARGUMENTS` in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def typed(*arguments: object) -> Answer:
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


@pytest.mark.parametrize("command", ["pacs", "doctor", "build", "bench", "masks"])
def test_help_of_every_command_says_what_it_does(ask: Ask, command: str) -> None:
    code, out, err = ask(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: dwm-fast {command}" in out
    assert ask(command, "-h")[1] == out


def test_help_lists_the_commands_and_every_option_explains_itself(ask: Ask) -> None:
    code, out, _ = ask("--help")
    assert code == 0
    for word in ("pacs", "doctor", "masks", "--debug", "--version"):
        assert word in out
    out = ask("pacs", "--help")[1]
    rows = re.findall(r"^│? *--([a-z-]+)[^<│]*(?:<\w+>|[A-Z]+)?(.*)", out, re.MULTILINE)
    assert len(rows) > 20
    assert all(re.search(r"\w", explanation) for _, explanation in rows), rows


def test_no_command_shows_the_help(ask: Ask) -> None:
    code, out, err = ask()
    assert (code, err) == (2, "")
    assert "pacs" in out


def test_version(ask: Ask) -> None:
    assert ask("--version")[1] == f"dwm-fast {dwm_fast.__version__}\n"


def one_line(answer: Answer, *words: str, code: int = 2) -> None:
    assert answer[0] == code, answer
    err = answer[2]
    assert re.fullmatch(r"dwm-fast: [^\n]+\n", err), err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pcas"], ["No such command 'pcas'", "dwm-fast --help"]),
        (["pacs", "--sead", "1"], ["--sead", "dwm-fast pacs --help"]),
        (["pacs", "--batch-size", "many"], ["--batch-size"]),
        (["pacs", "--seeds"], ["--seeds"]),
        (["pacs", "extra"], ["extra"]),
        (["pacs", "--sources", "clipart"], ["clipart", "photo"]),
        (["pacs", "--sources", "photo", "--targets", "photo"], ["two different domains"]),
        (["pacs", "--sources", ""], ["nothing to do"]),
        (["pacs", "--methods", "magic"], ["magic", "none, naive, edit, binary"]),
        (["pacs", "--inits", "S_mid"], ["S_mid", "S_start, S_end, random"]),
        (["pacs", "--seeds", "one"], ["seeds", "'one'", "whole number"]),
        (["pacs", "--backbone", "resnet19"], ["resnet19", "such as resnet"]),
        (["pacs", "--batch-size", "0"], ["batch_size=0"]),
        (["pacs", "--crop-scale", "2"], ["crop_scale=2.0"]),
        (["pacs", "--source-lr", "-1"], ["source", "lr is -1.0"]),
        (["pacs", "--mask-epochs", "-1"], ["binary", "epochs is -1"]),
        (["pacs", "--source-budget", "0"], ["source_budget is 0.0"]),
        (["pacs", "--tune-lr", "binary"], ["--tune-lr binary", "METHOD=VALUE"]),
        (["pacs", "--tune-lr", "binary=fast"], ["binary", "'fast'", "number"]),
        (["pacs", "--tune-lr", "magic=0.1"], ["unknown method 'magic'"]),
        (["pacs", "--batch-norm", "binary=thawed"], ["thawed", "frozen, shared, per-domain"]),
        (["pacs", "--batch-norm", "none=frozen,frozen"], ["tune.none", "same batch_norm"]),
        (["pacs", "--amp", "fp8"], ["amp=fp8"]),
        (["pacs", "--device", "tpu"], ["device 'tpu'", "--device cpu"]),
        (["pacs", "--config", "nowhere.toml"], ["cannot read nowhere.toml"]),
        (["pacs", "--data", "nowhere"], ["nowhere", "no such file or folder"]),
        (["pacs", "--splits", "lists"], ["lists", "--data"]),
        (["pacs", "--download"], ["--download needs --data FOLDER"]),
        (["pacs", "--engine", "threads"], ["--engine threads", "expected processes"]),
        (["pacs", "--engine", "processes", "--workers", "0"], ["--workers 0", "at least 1"]),
        (["pacs", "--workers", "2"], ["--workers needs --engine processes"]),
        (["pacs", "--engine", "processes", "--collect"], ["--collect and --engine exclude each other"]),
        (["pacs", "--weights", "nowhere.pth"], ["there is no file nowhere.pth"]),
        (["pacs", "--weights", "torchvision"], ["torchvision has none", "'small'"]),
        (["masks", "inspect", "nowhere.safetensors"], ["nowhere.safetensors"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0] in ("pacs", "masks", "pcas") else "",
)
def test_a_wrong_command_is_one_line_that_names_it(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    tiny(monkeypatch)
    one_line(ask(*arguments), *words)


def spoil(root: Path) -> Path:
    (write_tree(root) / "photo" / "dog" / "pic_1.png").write_bytes(png(("photo", 0, 1), 64)[:80])
    return root


def labels_from_one(root: Path) -> Path:
    return write_parquet(root / "pacs.parquet", label=lambda item: item[1] + 1, path=lambda item: None)


def nothing(root: Path) -> Path:
    root.mkdir()
    return root


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, ["looked for", "data"]),
        (spoil, ["pic_1.png", "unreadable image"]),
        (labels_from_one, ["label 7", "count from 1"]),
    ],
)
def test_wrong_images_are_one_line_that_names_the_file(
    ask: Ask, tmp_path: Path, make: Callable[[Path], Path], words: list[str]
) -> None:
    one_line(ask("pacs", "--data", make(tmp_path / "data"), "--image-size", "8"), *words)
    assert not (tmp_path / "runs").exists()


def test_lists_that_count_from_zero_are_one_line(ask: Ask, tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", first=0)
    one_line(ask("pacs", "--data", write_tree(tmp_path / "data"), "--splits", lists, "--image-size", "8"), "kfold.txt")


def test_a_checkpoint_of_another_network_is_one_line_before_any_training(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    torch.save(NarrowNet(width=12).state_dict(), tmp_path / "other.pth")
    one_line(ask("pacs", "--weights", "other.pth", "--image-size", "16"), "other.pth is of another network", "conv1")
    assert stages(tmp_path / "runs" / "pacs") == []


def test_stages_are_listed_done_and_collected_one_by_one(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})
    monkeypatch.setattr("dwm_fast.pacs.config.builtin_defaults", lambda: CONFIG)
    study = ("pacs", "--sources", "photo", "--targets", "sketch", "--methods", "none", "--out", "here")
    source, tune = "source-photo-seed0", "tune-photo-sketch-none---seed0"
    assert ask(*study, "--list-stages") == (0, f"ready\t{source}\t-\nwaiting\t{tune}\t{source}\n", "")
    assert not (tmp_path / "here").exists()
    one_line(ask(*study, "--collect"), "2 of 2 stages are not done", source)
    one_line(ask(*study, "--collect", "--stage", tune), "--stage and --collect exclude each other")
    one_line(ask(*study, "--stage", "tune"), "no stage 'tune'", tune)
    assert not (tmp_path / "here").exists()
    code, out, err = ask(*study, "--stage", tune)
    assert (code, err) == (0, "")
    assert f"{tune}: source 0." in out
    assert ask(*study, "--list-stages")[1] == f"done\t{source}\t-\ndone\t{tune}\t{source}\n"
    code, out, err = ask(*study, "--collect")
    assert (code, err) == (0, "")
    assert "report: here/report.html" in out
    assert (tmp_path / "here" / "results.json").exists()


def test_the_run_folder_is_named_after_the_kind_of_study(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr("dwm_fast.pacs.terminal.run_with_progress", lambda config, out: found.append(str(out)))
    for words in (["pacs"], ["pacs", "sequence", "photo,art"], ["pacs", "--sequence", "photo,art"]):
        assert ask(*words)[0] == 0
    assert found == ["runs/pacs", "runs/sequence", "runs/sequence"]


def test_a_run_folder_that_cannot_be_written_is_one_line(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    (tmp_path / "taken").write_text("")
    one_line(ask("pacs", "--out", "taken"), "cannot write taken: ", "choose another folder")


def test_a_full_disk_is_one_line(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    one_line(ask("pacs"), "cannot write", "No space left on device", "free the disk")


def test_an_error_nobody_foresaw_is_one_line_too_and_debug_shows_where(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: StudyConfig, out: Path) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("dwm_fast.pacs.terminal.run_with_progress", fail)
    one_line(ask("pacs"), "KeyError: 'surprise'", "--debug", code=1)
    for arguments in (["--debug", "pacs"], ["pacs", "--debug"]):
        code, _, err = ask(*arguments)
        assert code == 1
        assert "Traceback" in err
        assert ", in fail" in err


def test_debug_shows_the_traceback_of_a_users_error(ask: Ask) -> None:
    code, _, err = ask("pacs", "--data", "nowhere", "--debug")
    assert code == 2
    assert err.count("Traceback") >= 1
    assert err.splitlines()[-1].startswith("dwm-fast: nowhere")


def test_ctrl_c_says_how_to_go_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: StudyConfig, out: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dwm_fast.pacs.terminal.run_with_progress", stop)
    one_line(ask("pacs"), "stopped; the same command goes on where it was", code=130)


def test_defaults_are_the_built_in_study_or_the_real_one(ask: Ask, configured: list[StudyConfig]) -> None:
    ask("pacs")
    ask("pacs", "--data", "somewhere")
    assert configured == [builtin_defaults(), StudyConfig(**{**vars(real_defaults()), "data": "somewhere"})]


def test_flags_win_over_the_file_and_the_file_over_the_defaults(
    ask: Ask, configured: list[StudyConfig], tmp_path: Path
) -> None:
    (tmp_path / "study.toml").write_text(
        'data = "images"\nseeds = [5]\nbatch_size = 8\nimage_size = 64\n[binary]\nepochs = 9\nlr = 0.5\n'
        "[[tune.edit]]\nlr = 0.1\n[[tune.edit]]\nlr = 0.2\n"
    )
    flags = ["--seeds", "1,2", "--batch-size", "4", "--mask-epochs", "3", "--tune-lr", "binary=0.1,0.2"]
    flags += ["--tune-lr", "binary=0.3", "--batch-norm", "none=frozen,per-domain", "--tune-epochs", "7"]
    ask("pacs", "--config", "study.toml", *flags)
    (config,) = configured
    assert (config.data, config.seeds, config.batch_size, config.image_size) == ("images", (1, 2), 4, 64)
    assert (config.binary.epochs, config.binary.lr, config.edit.epochs) == (3, 0.5, 3)
    assert config.backbone == "resnet18", "a file that names data starts from the defaults for real images"
    assert [way.lr for way in config.tune["binary"]] == [0.1, 0.2, 0.3]
    assert [way.batch_norm for way in config.tune["none"]] == ["frozen", "per-domain"]
    assert [way.lr for way in config.tune["edit"]] == [0.1, 0.2], "ways of the file are not lost to --tune-epochs"
    assert {way.epochs for ways in config.tune.values() for way in ways} == {7}


def test_a_study_from_start_to_report(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    arguments = ["pacs", "--config", "tiny.json", "--out", "out", "--sources", "photo", "--methods", "none,naive"]
    code, out, err = ask(*arguments)
    assert (code, err) == (0, "")
    assert "images: procedural stand-in (not PACS)" in out
    assert "[1/4] source photo: accuracy 0." in out
    assert "[4/4] photo -> sketch, naive, S_start: source " in out
    assert out.rstrip().endswith("report: out/report.html")
    assert (tmp_path / "out" / "report.html").exists()
    code, again, _ = ask(*arguments)
    assert code == 0
    assert [line for line in again.splitlines() if line.startswith("[")] == [
        line for line in out.splitlines() if line.startswith("[")
    ]
    one_line(ask(*arguments, "--batch-size", "8"), "other settings", "batch_size: 16 there, 8 now", "--out")


def test_weights_are_reported_at_the_start(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.study.Study.run", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    torch.save({k: v for k, v in NarrowNet().state_dict().items() if not k.startswith("fc")}, tmp_path / "part.pth")
    code, out, _ = ask("pacs", "--weights", "part.pth")
    assert code == 130
    assert re.search(r"weights: from part.pth, \d+ of \d+ tensors; fresh: fc\n", out)


def test_masks_of_a_run_can_be_inspected(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results, folder: [])
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    ask("pacs", "--config", "tiny.json", "--out", "out", "--sources", "photo", "--methods", "naive")
    code, out, _ = ask("masks", "inspect", "out/masks/naive-photo-seed0.safetensors")
    assert code == 0
    assert "naive" in out
    assert "conv1.weight" in out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("dwm-fast pa", "pacs"), ("dwm-fast pacs --sou", "--sources"), ("dwm-fast pacs sequence --task", "--task-epochs")],
)
def test_the_tab_key_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, ask: Ask, typed: str, offered: str
) -> None:
    monkeypatch.setenv("_DWM_FAST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, out, err = ask()
    assert (code, err) == (0, "")
    assert offered in out.split()


def test_help_says_how_to_switch_completion_on(ask: Ask) -> None:
    assert "--install-completion" in ask("--help")[1]


def test_the_installed_command_runs_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from dwm_fast.cli import main; main()", "pacs", "--sources", "clipart"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"dwm-fast: [^\n]*clipart[^\n]*\n", done.stderr)


@pytest.mark.parametrize("command", ["pairs", "sequence"])
def test_a_run_folder_is_a_path_whatever_the_installed_typer_makes_of_parameters(command, tmp_path, monkeypatch):
    """The context of older ones holds the text that was typed; only a command's arguments are converted."""
    from types import SimpleNamespace

    from dwm_fast import pacs_cli

    given = []
    monkeypatch.setattr(pacs_cli, "_run", lambda base, given_, sections: given.append(given_))
    monkeypatch.setattr(pacs_cli, "_base", lambda given_: SimpleNamespace(tune={}))
    typed = SimpleNamespace(params={"out": str(tmp_path), "config": None, "settings": None}, invoked_subcommand=None)
    arguments = {"domains": "a,b"} if command == "sequence" else {}
    getattr(pacs_cli, command)(typed, out=tmp_path, **arguments)
    assert given[0]["out"] == tmp_path
