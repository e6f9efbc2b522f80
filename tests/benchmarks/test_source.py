"""Commits, edits and fingerprints of a tree."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dwm_fast._bench.dev import report
from dwm_fast._bench.dev.source import Source, find_source, resolve, tree_fingerprint
from dwm_fast._bench.results import ResultFile, read
from dwm_fast.errors import InputError
from tests.benchmarks.test_results import ROW


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("dwm_fast/a.py", "kernels/b.py", "csrc/c.cpp", "benchmarks/d.py", "pyproject.toml", "docs/e.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    _git(root, "init", "-q")
    _commit(root)
    return root


def _git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _commit(root: Path) -> str:
    _git(root, "add", "-A")
    _git(root, "commit", "-q", "-m", "x")
    return _git(root, "rev-parse", "HEAD")[:12]


def test_a_clean_checkout_is_its_commit(tree: Path) -> None:
    assert find_source(tree) == Source(_git(tree, "rev-parse", "HEAD")[:12])


@pytest.mark.parametrize("name", ["kernels/b.py", "csrc/new.cu", "pyproject.toml", "benchmarks/d.py"])
def test_an_edit_or_a_new_file_among_what_is_measured_makes_it_dirty(tree: Path, name: str) -> None:
    (tree / name).write_text("edited")
    assert find_source(tree).dirty == name


def test_files_of_another_commit_than_the_one_checked_out_are_known_by_their_fingerprint(
    tree: Path, tmp_path: Path
) -> None:
    """As where a machine gets today's files beside the git folder of yesterday."""
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    for where in (tree, copy):
        (where / "dwm_fast/a.py").write_text("later")
    _commit(tree)
    source = find_source(copy)
    assert source == Source(f"tree:{tree_fingerprint(tree)}", "dwm_fast/a.py")
    assert resolve(tree, source.commit) == find_source(tree).commit


@pytest.mark.parametrize("name", ["docs/e.md", "tests/new.py", "benchmarks/results/chip.csv"])
def test_edits_elsewhere_and_results_do_not(tree: Path, name: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("edited")
    assert find_source(tree).dirty == ""


def test_a_copy_without_git_is_known_again_by_its_fingerprint(tree: Path, tmp_path: Path) -> None:
    first = _git(tree, "rev-parse", "HEAD")[:12]
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
    (copy / "dwm_fast/__pycache__").mkdir()
    (copy / "dwm_fast/__pycache__/a.pyc").write_bytes(b"x")
    source = find_source(copy)
    assert source == Source(f"tree:{tree_fingerprint(tree)}")
    (tree / "dwm_fast/a.py").write_text("later")
    _commit(tree)
    assert resolve(tree, source.commit) == first
    (copy / "dwm_fast/a.py").write_text("edited there")
    assert resolve(tree, find_source(copy).commit) is None


def test_taking_results_in_puts_commits_for_fingerprints_and_refuses_unknown_ones(tree: Path, tmp_path: Path) -> None:
    known, files = f"tree:{tree_fingerprint(tree)}", []
    for name, commit in (("chip", known), ("edited", "tree:0123"), ("installed", "release 0.1.0")):
        files.append(tmp_path / f"{name}.csv")
        ResultFile(files[-1]).record([replace(ROW, commit=commit)])
    for unknown in files[1:]:
        with pytest.raises(InputError, match="edited tree or an installed package"):
            report.take([files[0], unknown], tree)
    assert not (tree / "benchmarks" / "results").exists()
    report.take(files[:1], tree)
    assert [row.commit for row in read(tree / "benchmarks" / "results" / "chip.csv")] == [
        _git(tree, "rev-parse", "HEAD")[:12]
    ]
