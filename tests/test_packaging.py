"""An installed copy has every folder and every file that the library reads, not only its modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FILES = [path for path in (ROOT / "dwm_fast").rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def package(folder: Path) -> str:
    return ".".join(folder.relative_to(ROOT).parts)


def test_every_folder_with_modules_is_a_package_that_is_installed() -> None:
    assert {package(path.parent) for path in FILES if path.suffix == ".py"} <= set(TOOL["packages"])


def test_every_file_that_is_no_module_is_package_data() -> None:
    shipped = {
        path
        for name, patterns in TOOL["package-data"].items()
        for pattern in patterns
        for path in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    others = {path for path in FILES if path.suffix not in (".py", ".so")}
    assert others, "the templates of the study's page are such files"
    assert others <= shipped
