"""Every name of torch and Triton that the code uses exists in the releases that are installed.

A type checker reads stubs, and skips what it has none for; a line that only a GPU reaches is run by nobody here. So
every dotted path that begins at an imported module is looked up.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dwm_fast.ops

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "dwm_fast", "benchmarks")
CHECKED = ("torch", "triton", "torchvision")
OURS = ("torch.ops.dwm_fast", "torch.ops.dwm_fast_cpu", "torch.ops.dwm_fast_cuda")
"""What this library's own extensions define when they are loaded; dwm_fast itself is, by the import above."""
ABSENT = object()


def module_names(tree: ast.AST) -> tuple[dict[str, str], list[str]]:
    """Local name -> dotted path of what is imported from a checked package, and every such path."""
    names, paths = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                names[alias.asname or package] = alias.name if alias.asname else package
                paths.append(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                paths.append(f"{node.module}.{alias.name}")
    return {name: path for name, path in names.items() if checked(path)}, list(filter(checked, paths))


def checked(path: str) -> bool:
    return path.partition(".")[0] in CHECKED


def dotted(node: ast.AST) -> list[str] | None:
    """["a", "b", "c"] of the expression a.b.c."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


def paths_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted path of every use of a checked package."""
    tree = ast.parse(source)
    names, imported = module_names(tree)
    yield from ((1, path) for path in imported)
    for node in ast.walk(tree):
        parts = dotted(node) if isinstance(node, ast.Attribute) else None
        if parts and parts[0] in names:
            yield node.lineno, ".".join([names[parts[0]], *parts[1:]])


def missing(path: str) -> str | None:
    """The first part of a dotted path that does not exist; what an instance holds is not looked into."""
    parts = path.split(".")
    value: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        found = getattr(value, part, ABSENT)
        if not (isinstance(found, ModuleType) or inspect.isclass(found)):
            if found is not ABSENT and (i == len(parts) - 1 or _follows(found, parts[i + 1])):
                return None
            try:  # a module that is not imported yet, or that a function of its name hides: torch.nn.utils.weight_norm
                found = importlib.import_module(".".join(parts[: i + 1]))
            except ImportError:
                return ".".join(parts[: i + 1 if found is ABSENT else i + 2])
        value = found
    return None


def _follows(value: object, name: str) -> bool:
    """Whether an object has an attribute; asked of its class too, since a property may want a GPU."""
    return hasattr(type(value), name) or hasattr(value, name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_of_torch_and_triton_exists(folder: str) -> None:
    assert dwm_fast.ops
    wrong, seen = [], 0
    for file in sorted((ROOT / folder).rglob("*.py")):
        for line, path in paths_of(file.read_text()):
            if path.startswith(OURS[1:]):
                continue
            seen += 1
            if missing(path):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {missing(path)}")
    assert not wrong, f"torch {torch.__version__} has none of these:\n" + "\n".join(wrong)
    assert seen > 30


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.cuda.is_current_streamcapturing()", "torch.cuda.is_current_streamcapturing"),
        ("from torch import nn\nnn.functional.softmx", "torch.nn.functional.softmx"),
        ("import torch.nn.functional as F\nF.linaer(1)", "torch.nn.functional.linaer"),
        ("import triton.language as tl\ntl.program_idx(0)", "triton.language.program_idx"),
        ("from torch import Tensr", "torch.Tensr"),
        ("from torch.nn.utils.weight_norm import WeightNrm", "torch.nn.utils.weight_norm.WeightNrm"),
        ("import torch\ntorch.Tensor.pin_memry", "torch.Tensor.pin_memry"),
        ("import torch\ntorch.backends.cuda.matmul.fp32_precisio", "torch.backends.cuda.matmul.fp32_precisio"),
        ("import torch\ntorch.ops.dwm_fast.sampel", "torch.ops.dwm_fast.sampel"),
    ],
)
def test_a_name_that_does_not_exist_is_found(source: str, name: str) -> None:
    assert [missing(path) for _, path in paths_of(source) if missing(path)] == [name]
