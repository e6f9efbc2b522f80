"""A bare checkout measures itself, whatever is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from dwm_fast._bench import checkout


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


def test_the_device_script_is_sound_shell() -> None:
    script = checkout.TREE / "benchmarks" / "device.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
