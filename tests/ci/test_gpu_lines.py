"""The check of lines that only a GPU reaches turns red where it should."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / ".ci" / "gpu_lines.py"
SOURCE = """
import torch

def guard(device):
    if device.type == "cuda":
        return torch.cuda.device(device)
    return None

def early(device):
    if device.type != "cuda":
        return 1
    value = 2
    return value

def inline(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

@triton.jit
def kernel(x, NAME):
    if NAME == "cuda":
        x = 1
"""
RIGHT = (6, 12, 13, 16)
"""Lines of SOURCE that hang on a GPU."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_lines", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(lines: Any, context: str) -> dict[str, Any]:
    return {"files": {"kernels/a.py": {"contexts": {str(n): ["", context] for n in lines}}}}


def unreached(tool: ModuleType, folder: Path, lines: Any, context: str = "tests.cuda.test_a.test_b") -> set[str]:
    for area in tool.AREAS:
        path = folder / area
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("")
        else:
            path.mkdir(exist_ok=True)
    (folder / "kernels" / "a.py").write_text(SOURCE)
    return {code for _, code in tool.unreached(report(lines, context), folder)}


def test_what_tests_of_the_tier_run_is_reached(tool, tmp_path):
    assert unreached(tool, tmp_path, RIGHT) == set()


def test_each_line_that_hangs_on_a_gpu_is_missed_where_nobody_runs_it(tool, tmp_path):
    for line in RIGHT:
        missed = unreached(tool, tmp_path, set(RIGHT) - {line})
        assert missed == {SOURCE.splitlines()[line - 1].strip()}


def test_a_test_outside_of_the_tier_reaches_nothing(tool, tmp_path):
    assert len(unreached(tool, tmp_path, RIGHT, "tests.kernels.test_a.test_b")) == len(RIGHT)


def test_a_line_that_is_not_listed_and_a_listed_one_that_is_run_are_both_named(tool):
    (only,) = tool.complaints({("a.py", "x()")}, set())
    assert "no test of tests/cuda runs it: x()" in only
    (only,) = tool.complaints(set(), {("a.py", "x()")})
    assert "strike it" in only


def test_a_listed_line_needs_a_reason(tool):
    with pytest.raises(SystemExit, match="no reason"):
        tool.listed('[[line]]\nfile = "a.py"\ncode = "x()"\n')


def test_every_listed_line_is_in_its_file(tool):
    for file, code in tool.listed(tool.LIST.read_text()):
        assert code in {line.strip() for line in (tool.ROOT / file).read_text().splitlines()}
    assert json.dumps(sorted(tool.listed(tool.LIST.read_text())))
