"""A bare checkout measures itself, whatever is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from dwm_fast._bench.dev import checkout


def test_the_mapped_packages_come_from_the_tree_that_is_run(tmp_path: Path) -> None:
    shutil.copytree(checkout.TREE / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    for folder in ("dwm_fast", "kernels", "csrc"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    code = (
        "import benchmarks, dwm_fast, dwm_fast.kernels, dwm_fast._csrc, dwm_fast._bench\n"
        "print(dwm_fast.__file__, dwm_fast.kernels.__file__, dwm_fast._csrc.__file__, dwm_fast._bench.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [Path(p).resolve().parent for p in done.stdout.split()]
    assert found == [(tmp_path / f).resolve() for f in ("dwm_fast", "kernels", "csrc", "benchmarks")]


def test_what_is_installed_does_not_need_what_only_a_checkout_has() -> None:
    listed = tomllib.loads((checkout.TREE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    assert [name for name in listed if "_bench" in name] == ["dwm_fast._bench"]
    modules = sorted(path.stem for path in (checkout.TREE / "benchmarks").glob("*.py") if path.stem != "__init__")
    code = (
        "import importlib, sys\n"
        "sys.modules['dwm_fast._bench.dev'] = None\n"
        f"for name in {modules}: importlib.import_module(f'dwm_fast._bench.{{name}}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
