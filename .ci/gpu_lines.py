"""Lines that only a GPU reaches: what hangs on a condition about CUDA must be run by tests/cuda, or be listed.

    coverage run -m pytest tests/cuda tests/ops && coverage json -q -o coverage.json
    python .ci/gpu_lines.py coverage.json

Prints how much of each folder was run. Fails for a line that hangs on CUDA, that no test of tests/cuda ran, and that
gpu_only.toml does not name; and for one that it names and that a test has run, or that is gone.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("gpu_only.toml")
AREAS = (
    "kernels",
    "dwm_fast/ops",
    "dwm_fast/optim",
    "dwm_fast/nn",
    "dwm_fast/bank",
    "dwm_fast/graphs.py",
    "dwm_fast/doctor.py",
)
TIER = "tests.cuda."

_NAMES = ("is_cuda", "capturing", "cuda_stream")
"""Attributes and functions that ask about a GPU, beside torch.cuda itself and a comparison with "cuda" or "cpu"."""


def asks(test: ast.expr) -> bool:
    """Whether a condition depends on a GPU."""
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute) and (node.attr in _NAMES or ast.unparse(node).startswith("torch.cuda.")):
            return True
        if isinstance(node, ast.Name) and node.id in _NAMES:
            return True
        if isinstance(node, ast.Compare) and words(node) & {"cuda", "cpu"}:
            return True
    return False


def words(test: ast.Compare) -> set[object]:
    """The constants that are compared with."""
    return {side.value for side in (test.left, *test.comparators) if isinstance(side, ast.Constant)}


def without_gpu(test: ast.expr) -> bool:
    """Whether a condition holds where there is no GPU: `x.type != "cuda"`, `x.type == "cpu"`, `not x.is_cuda`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return not without_gpu(test.operand)
    if isinstance(test, ast.BoolOp):
        return any(without_gpu(value) for value in test.values if asks(value))
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.NotEq) != ("cpu" in words(test))


def is_kernel(node: ast.AST) -> bool:
    """Whether a function runs on the device: Triton's, which coverage cannot follow into compiled code."""
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any("triton.jit" in ast.unparse(d) for d in decorators)


def hanging(body: list[ast.stmt]) -> Iterator[int]:
    """First lines of the statements that run only where a condition about a GPU is answered with yes."""
    for i, statement in enumerate(body):
        if is_kernel(statement):
            continue
        if isinstance(statement, (ast.If, ast.While)):
            if asks(statement.test):
                negative = without_gpu(statement.test)
                yield from lines(statement.orelse if negative else statement.body)
                if negative and isinstance(statement.body[-1], (ast.Return, ast.Raise, ast.Continue)):
                    yield from lines(body[i + 1 :])
                    return
        elif any(_inline(node) for node in own_expressions(statement)):
            yield statement.lineno
        for name in ("body", "orelse", "finalbody"):
            yield from hanging(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from hanging(handler.body)


def _inline(node: ast.AST) -> bool:
    """A choice inside a line: it has been made only if the line was run where there is a GPU."""
    if isinstance(node, ast.IfExp):
        return asks(node.test)
    return isinstance(node, ast.BoolOp) and any(asks(value) for value in node.values[:-1])


def own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """Everything below a statement but other statements."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from ast.walk(child)


def lines(body: list[ast.stmt]) -> Iterator[int]:
    """First lines of statements and of all inside them that runs where there is a GPU."""
    for statement in body:
        if is_kernel(statement):
            continue
        yield statement.lineno
        elsewhere = isinstance(statement, ast.If) and asks(statement.test) and without_gpu(statement.test)
        yield from lines([] if elsewhere else getattr(statement, "body", []))
        for name in ("orelse", "finalbody"):
            yield from lines(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from lines(handler.body)


def unreached(report: dict[str, Any], root: Path = ROOT) -> set[tuple[str, str]]:
    """(file, code) of the lines that hang on a GPU and that no test of tests/cuda has run."""
    found = set()
    for path in measured(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text()
        contexts = report["files"].get(name, {}).get("contexts", {})
        for line in set(hanging(ast.parse(text).body)):
            if not any(context.startswith(TIER) for context in contexts.get(str(line), [])):
                found.add((name, text.splitlines()[line - 1].strip()))
    return found


def measured(root: Path) -> Iterator[Path]:
    for area in AREAS:
        path = root / area
        yield from [path] if path.suffix else sorted(path.rglob("*.py"))


def listed(text: str) -> set[tuple[str, str]]:
    """(file, code) of gpu_only.toml, each of which must say why."""
    entries = tomllib.loads(text).get("line", [])
    unsaid = [entry["code"] for entry in entries if not entry.get("reason")]
    if unsaid:
        raise SystemExit(f"gpu_only.toml gives no reason for: {', '.join(unsaid)}")
    return {(entry["file"], entry["code"]) for entry in entries}


def complaints(found: set[tuple[str, str]], known: set[tuple[str, str]]) -> list[str]:
    return [
        *(f"{file}: hangs on a GPU and no test of tests/cuda runs it: {code}" for file, code in sorted(found - known)),
        *(f"{file}: is run by now, or gone; strike it from the list: {code}" for file, code in sorted(known - found)),
    ]


def summary(report: dict[str, Any]) -> Iterator[str]:
    """How much of each area the measured tests run, device kernels' bodies left out."""
    for area in AREAS:
        run = count = 0
        for name, file in report["files"].items():
            if name == area or name.startswith(f"{area}/"):
                skipped = kernel_lines(ROOT / name)
                run += len(set(file["executed_lines"]) - skipped)
                count += len({*file["executed_lines"], *file["missing_lines"]} - skipped)
        yield f"{area}: {run} of {count} lines ({100 * run / max(count, 1):.1f} %)"


def kernel_lines(path: Path) -> set[int]:
    kernels = [node for node in ast.walk(ast.parse(path.read_text())) if is_kernel(node)]
    return {line for node in kernels for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def main(path: str) -> int:
    report = json.loads(Path(path).read_text())
    print(*summary(report), sep="\n")
    wrong = complaints(unreached(report), listed(LIST.read_text()))
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
