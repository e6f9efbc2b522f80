"""What comes from outside is shown as it is: no markup, no control sequence, no crash on a terminal without UTF-8."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from dwm_fast._screen import Screen, plain
from dwm_fast.bank import make_domain, write_mask_file
from dwm_fast.cli import main

from .pacs.study_for_tests import CONFIG, tiny

NAMES = ["blocks[encoder].weight", "x[/encoder].weight", "[red]a[/red]", ":smile:", "1e-3 'quoted'", r"\[a]"]


def printed(*things: object) -> str:
    screen = Screen(file=io.StringIO(), width=400)
    for thing in things:
        screen.print(thing, soft_wrap=True)
    return screen.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_and_colons_are_shown_alone_in_tables_and_in_titles(name: str) -> None:
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    assert printed(name) == f"{name}\n"
    assert printed(table).count(name) == 4


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_shown_without_a_control_character_and_two_texts_never_look_alike_by_one(text: str) -> None:
    for shown in (printed(text), printed(Text(text))):
        kinds = {unicodedata.category(letter) for letter in shown} - {"Zs"}
        assert not {kind for kind in kinds if kind[0] == "C"} - {"Cc"}  # format, surrogate, private, unassigned
        assert set(re.findall(r"[\x00-\x1f\x7f-\x9f]", shown)) <= {"\n"}
    assert "".join(plain(letter) for letter in text if letter != "\t") == plain(text.replace("\t", ""))


@pytest.mark.parametrize(("letter", "shown"), [("\x1b", r"\x1b"), ("\x07", r"\x07"), ("\u202e", r"\u202e")])
def test_control_characters_are_shown_as_escapes(letter: str, shown: str) -> None:
    assert plain(f"a{letter}b") == f"a{shown}b"
    assert printed(f"a{letter}b") == f"a{shown}b\n"


def test_a_terminal_without_utf_8_gets_letters_it_knows() -> None:
    code = (
        "import sys; from dwm_fast._screen import Screen, accept_any_text\n"
        "for encoding in sys.argv[1:]:\n"
        "    sys.stdout.reconfigure(encoding=encoding, errors='strict'); accept_any_text()\n"
        "    Screen(width=80).print('1 pair × 2 seeds, 0.5 ± 0.1, a → b, “q”, 中')"
    )
    encodings = ["ascii", "latin-1", "cp1252"]
    command = [sys.executable, "-c", code, *encodings]
    said = subprocess.run(command, capture_output=True, env={}, timeout=240, check=True).stdout.splitlines()
    assert len(said) == 3
    for line, encoding in zip(said, encodings, strict=True):
        text = line.decode(encoding)
        assert "a -> b" in text
        assert "?" in text
        assert text.startswith("1 pair x 2 seeds, 0.5 +- 0.1" if encoding == "ascii" else "1 pair × 2 seeds, 0.5 ± 0.1")


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dwm-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_a_study_on_an_ascii_terminal_ends_with_its_table_and_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dwm_fast.pacs.pairs.figures.draw_all", lambda results: {})
    Path("tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert typed(monkeypatch, "pacs", "--config", "tiny.json", "--methods", "naive", "--out", "runs [1]") == 0
    said = written.getvalue().decode("ascii")
    assert "Each cell averages 1 pair x 1 seed" in said
    assert said.rstrip().endswith("report: runs [1]/report.html")


def test_masks_inspect_shows_names_with_brackets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in NAMES[:3]:
        write_mask_file(tmp_path / "a.safetensors", make_domain("d", {name: torch.ones(2, 2).bool()}))
        assert typed(monkeypatch, "masks", "inspect", tmp_path / "a.safetensors") == 0
        assert name in capsys.readouterr().out


def test_an_error_with_a_control_sequence_is_one_harmless_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "pacs", "--data", "a\x1b[2Jb [bold]") == 2
    assert capsys.readouterr().err.startswith(r"dwm-fast: a\x1b[2Jb [bold]: no such file or folder")


def test_a_tilde_after_an_equals_sign_and_in_a_file_is_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found: list[object] = []
    monkeypatch.setattr("dwm_fast.pacs.terminal.run_with_progress", lambda config, out: found.append((config, out)))
    Path("a.toml").write_text('data = "~/PACS"\nweights = "~/w.pth"\nsplits = "~/lists"\n')
    typed(monkeypatch, "pacs", "--config=a.toml", "--out=~/runs")
    ((config, out),) = found  # type: ignore[misc]
    home = str(tmp_path / "home")
    assert (config.data, config.weights, config.splits) == (f"{home}/PACS", f"{home}/w.pth", f"{home}/lists")
    assert out == Path(home, "runs")
