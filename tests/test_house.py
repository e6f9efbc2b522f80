"""The walls of the house: imports run one way, rooms stay small, launchers are typed, arguments travel as values."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS, KERNELS = sorted((ROOT / "dwm_fast/ops").glob("*.py")), sorted((ROOT / "kernels").glob("*.py"))
VALUES = {"_toolchain", "coding", "devices", "draw", "geometry", "measured", "packing", "problem"}
"""Files of ops with values, formats, tables and checks, no operation: what a kernel may know of the floor above."""
MOST_PARAMETERS = 8

ABOVE = {
    "ops": {"nn", "optim", "bank", "methods", "pacs", "cli"},
    "nn": {"bank", "methods", "pacs", "cli"},
    "optim": {"bank", "methods", "pacs", "cli"},
    "bank": {"methods", "pacs", "cli"},
    "methods": {"pacs", "cli"},
    "pacs": {"cli"},
}
"""Room -> rooms that it may not import from; nn, optim and bank stand on one floor."""
MOST_LINES, MOST_BODY, MOST_DEVICE_BODY = 400, 50, 64
"""Of a file, of a function, and of a kernel that Triton compiles, which walks three layouts."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def host_functions(path: Path) -> Iterator[Function]:
    """Every function but those that Triton compiles."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, Function) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def parameters(function: Function) -> list[ast.arg]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)]
    return [a for a in named if a.arg not in ("self", "cls")]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_kernel_file_calls_no_operation_and_chooses_no_way(path: Path) -> None:
    above = {name.split(".")[2] for name in imports(path) if name.startswith("dwm_fast.ops.")}
    assert above <= VALUES
    others = {name.split(".")[1] for name in imports(path) if name.startswith("dwm_fast.")}
    assert others <= {"errors", "kernels", "ops"}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_know_no_operation(name: str) -> None:
    above = {i.split(".")[2] for i in imports(ROOT / f"dwm_fast/ops/{name}.py") if i.startswith("dwm_fast.ops.")}
    assert above <= VALUES


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_function_of_a_kernel_file_has_types_unless_triton_compiles_it(path: Path) -> None:
    bare = [f.name for f in host_functions(path) if f.returns is None or any(not a.annotation for a in parameters(f))]
    assert not bare


def test_at_most_one_function_in_ten_takes_more_than_eight_parameters() -> None:
    functions = [(path.stem, f.name, len(parameters(f))) for path in (*OPS, *KERNELS) for f in host_functions(path)]
    long = [f"{stem}.{name}: {count}" for stem, name, count in functions if count > MOST_PARAMETERS]
    assert len(functions) > 200
    assert len(long) <= len(functions) / 10, long


@pytest.mark.parametrize("room", ABOVE)
def test_no_room_imports_from_one_above_it(room: str) -> None:
    found = {path: set(imports(path)) for path in (ROOT / "dwm_fast" / room).rglob("*.py")}
    wrong = [
        (path.name, name)
        for path, names in found.items()
        for name in names
        if name.startswith("dwm_fast.") and name.split(".")[1] in ABOVE[room]
    ]
    assert found
    assert not wrong


def product_files() -> list[Path]:
    python = [path for top in ("dwm_fast", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    return [*python, *(path for path in (ROOT / "csrc").iterdir() if path.is_file())]


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in product_files()}
    assert len(lengths) > 150
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for path in product_files():
        if path.suffix != ".py":
            continue
        host = {id(f) for f in host_functions(path)}
        for function in ast.walk(tree_of(path)):
            if not isinstance(function, Function):
                continue
            body = function.body[1:] if ast.get_docstring(function) else function.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if length > (MOST_BODY if id(function) in host else MOST_DEVICE_BODY):
                long.append((path.name, function.name, length))
    assert not long
