"""What README and docs tell a reader to type works: code runs, commands and flags exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from dwm_fast.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prelude(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page's prose says its reader has: networks, batches of images and labels, a folder of images."""
    path = ROOT / "tests" / "pages" / (re.sub(r"\W+", "_", name.removesuffix(".md")).lower() + ".py")
    own: dict[str, Any] = {"monkeypatch": monkeypatch}
    if path.is_file():
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), own)
    return own


@pytest.mark.parametrize("name", [n for n in NAMES if n != "docs/layers.md" and blocks(n, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    given = prelude(name, monkeypatch)
    for i, block in enumerate(blocks(name, "python")):
        exec(compile(block, f"{name}, block {i + 1}", "exec"), given)


def commands(name: str) -> Iterator[list[str]]:
    """Lines of shell blocks and of indented blocks that start a program of ours, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = "\n".join(blocks(name, "sh")).splitlines()
    lines += [line for line in re.findall(r"^ {4}(.*)$", text, re.MULTILINE) if re.match(r"dwm-fast |python -m ", line)]
    for line in lines:
        line = re.split(r"\s{2,}|\s#", line)[0] if line.startswith("dwm-fast") else line
        for part in re.split(r"&&|\|", line):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def _parameters(words: list[str]) -> tuple[set[str], list[str]]:
    """Flags of the command that `words` names, and the words after its name; AssertionError where there is none."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and hasattr(command, "commands") and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    assert not (hasattr(command, "commands") and rest and not rest[0].startswith("-")), f"no command {words}"
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"--help"}, rest


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_page_exist_with_their_flags(name):
    for words in commands(name):
        program = words[0].rpartition("/")[2]
        if program == "dwm-fast":
            flags, rest = _parameters(words[1:])
            unknown = [w for w in rest if w.startswith("--") and w.partition("=")[0] not in flags]
            assert not unknown, f"{name}: {' '.join(words)}"
        elif program.startswith("python") and words[1:2] == ["-m"] and words[2].startswith(("benchmarks", "dwm_fast")):
            assert importlib.util.find_spec(words[2]) is not None, f"{name}: {' '.join(words)}"


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_page_lead_to_files_and_headings(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {link}"
