"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import dwm_fast

ROOT = Path(dwm_fast.__file__).parent
MODULES = sorted(
    ".".join(("dwm_fast", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("reference")
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.attempted > 0
    assert results.failed == 0


def test_the_public_operations_and_layers_have_examples():
    assert {"dwm_fast.nn.masking", "dwm_fast.nn.merge", "dwm_fast.ops.sample"} <= set(MODULES)


@pytest.mark.usefixtures("reference")
def test_the_examples_of_the_layers_page_run_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    page = (Path(__file__).parents[1] / "docs" / "layers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 8
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), "docs/layers.md", "exec"), {})
