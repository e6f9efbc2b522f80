"""Commits, edits and fingerprints of a tree."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dwm_fast._bench import merge
from dwm_fast._bench.source import Source, find_source, resolve, tree_fingerprint
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
    assert find_source(tree, "1.0") == Source(_git(tree, "rev-parse", "HEAD")[:12])


@pytest.mark.parametrize("name", ["kernels/b.py", "csrc/new.cu", "pyproject.toml", "benchmarks/d.py"])
def test_an_edit_or_a_new_file_among_what_is_measured_makes_it_dirty(tree: Path, name: str) -> None:
    (tree / name).write_text("edited")
    assert find_source(tree, "1.0").dirty == name


@pytest.mark.parametrize("name", ["docs/e.md", "tests/new.py", "benchmarks/results/chip.csv"])
def test_edits_elsewhere_and_results_do_not(tree: Path, name: str) -> None:
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("edited")
    assert find_source(tree, "1.0").dirty == ""


def test_an_installed_copy_is_its_release(tmp_path: Path) -> None:
    assert find_source(tmp_path, "1.0") == Source("release 1.0")


def test_a_copy_without_git_is_known_again_by_its_fingerprint(tree: Path, tmp_path: Path) -> None:
    first = _git(tree, "rev-parse", "HEAD")[:12]
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
    (copy / "dwm_fast/__pycache__").mkdir()
    (copy / "dwm_fast/__pycache__/a.pyc").write_bytes(b"x")
    source = find_source(copy, "1.0")
    assert source == Source(f"tree:{tree_fingerprint(tree)}")
    (tree / "dwm_fast/a.py").write_text("later")
    _commit(tree)
    assert resolve(tree, source.commit) == first
    (copy / "dwm_fast/a.py").write_text("edited there")
    assert resolve(tree, find_source(copy, "1.0").commit) is None


def test_merging_puts_commits_for_fingerprints_and_refuses_unknown_ones(tree: Path) -> None:
    known, unknown = replace(ROW, commit=f"tree:{tree_fingerprint(tree)}"), replace(ROW, commit="tree:0123")
    assert [r.commit for r in merge.with_commits([known], tree)] == [_git(tree, "rev-parse", "HEAD")[:12]]
    with pytest.raises(ValueError, match="edited tree"):
        merge.with_commits([known, unknown], tree)
