"""The plan of docs/architecture.md holds: imports run one way, rooms stay small, arguments travel as values."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "ops", "nn", "optim", "bank", "methods", "pacs")
ABOVE = {
    "kernels": {"ops", "nn", "optim", "bank", "methods", "pacs", "cli"},
    "ops": {"nn", "optim", "bank", "methods", "pacs", "cli"},
    "nn": {"bank", "methods", "pacs", "cli"},
    "optim": {"bank", "methods", "pacs", "cli"},
    "bank": {"methods", "pacs", "cli"},
    "methods": {"pacs", "cli"},
    "pacs": {"cli"},
}
"""Room -> the rooms that it may not import from; nn, optim and bank stand on one floor."""


def folder(room: str) -> Path:
    return ROOT / room if room == "kernels" else ROOT / "dwm_fast" / room


def sources() -> list[Path]:
    return sorted(path for top in ("dwm_fast", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def on_device(function: ast.FunctionDef) -> bool:
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_from_one_above_it(room):
    wrong = []
    for path in folder(room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "dwm_fast" and len(parts) > 1 and parts[1] in ABOVE[room]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    lengths |= {path: len(path.read_text().splitlines()) for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400}


def test_no_function_body_is_longer_than_50_lines():
    long = []
    for path in sources():
        for function in functions(path):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            if body and (length := (body[-1].end_lineno or 0) - body[0].lineno + 1) > 50:
                long.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length}")
    assert not long


def test_at_most_one_in_ten_functions_of_ops_and_kernels_has_more_than_eight_parameters():
    many, count = [], 0
    for path in [*folder("ops").rglob("*.py"), *folder("kernels").rglob("*.py")]:
        for function in functions(path):
            if on_device(function):
                continue
            arguments = function.args
            count += 1
            if len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) > 8:
                many.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert len(many) <= count / 10, f"{len(many)} of {count}: {many}"
