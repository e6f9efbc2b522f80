"""Which source was measured: the commit, or a fingerprint of the files where there is no git.

python -m benchmarks.dev.source    print it
"""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .checkout import TREE

MEASURED = ("dwm_fast", "kernels", "csrc", "benchmarks", "pyproject.toml")
"""What can change a measurement; edits elsewhere (docs, tests) do not make a tree dirty."""
RESULTS = "benchmarks/results"
_IGNORED = ("__pycache__", ".so", ".pyc", ".egg-info")


@dataclass(frozen=True)
class Source:
    """What is measured.

    commit: short hash; "tree:<fingerprint>" without git, and where what is measured is not what is checked out: a
        copy of another commit's files carries that commit's fingerprint.
    dirty: first changed path or "".
    """

    commit: str
    dirty: str = ""


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def find_source(tree: Path) -> Source:
    """The source in `tree`: a git checkout, or a bare copy of one."""
    try:
        top = Path(_git(tree, "rev-parse", "--show-toplevel").strip())
        if top.resolve() != tree.resolve():
            raise FileNotFoundError
        status = _git(tree, "status", "--porcelain", "--", *MEASURED, f":(exclude){RESULTS}").splitlines()
        commit = _git(tree, "rev-parse", "--short=12", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return Source(f"tree:{tree_fingerprint(tree)}")
    return Source(f"tree:{tree_fingerprint(tree)}" if status else commit, status[0][3:] if status else "")


def _fingerprint(blobs: dict[str, str]) -> str:
    lines = "".join(f"{path} {blobs[path]}\n" for path in sorted(blobs))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _counts(path: str) -> bool:
    return not path.startswith(f"{RESULTS}/") and not any(mark in path for mark in _IGNORED)


def tree_fingerprint(tree: Path) -> str:
    """Fingerprint of the measured files on disk; equal to `commit_fingerprint` of the commit they come from."""
    blobs = {}
    for name in MEASURED:
        start = tree / name
        files = [start] if start.is_file() else [p for p in start.rglob("*") if p.is_file()]
        for path in files:
            relative = path.relative_to(tree).as_posix()
            if _counts(relative):
                data = path.read_bytes()
                blobs[relative] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return _fingerprint(blobs)


def commit_fingerprint(tree: Path, commit: str) -> str:
    """The same of a commit in the repository at `tree`, from git's own object names."""
    blobs = {}
    for line in _git(tree, "ls-tree", "-r", commit, "--", *MEASURED).splitlines():
        head, path = line.split("\t", 1)
        if _counts(path):
            blobs[path] = head.split()[2]
    return _fingerprint(blobs)


def resolve(tree: Path, commit: str, depth: int = 300) -> str | None:
    """The short hash of the commit that "tree:<fingerprint>" names, among the newest `depth`; else None."""
    wanted = commit.removeprefix("tree:")
    for candidate in _git(tree, "rev-list", f"--max-count={depth}", "HEAD").split():
        if commit_fingerprint(tree, candidate) == wanted:
            return candidate[:12]
    return None


if __name__ == "__main__":
    print(find_source(TREE).commit)
