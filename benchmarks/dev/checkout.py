"""Make a bare checkout importable as if installed: dwm_fast and its mapped packages all from this tree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

TREE = Path(__file__).resolve().parents[2]
"""The checkout that this file lies in."""

_FOLDERS = {
    "dwm_fast": "dwm_fast",
    "dwm_fast.kernels": "kernels",
    "dwm_fast._csrc": "csrc",
    "dwm_fast._bench": "benchmarks",
}


class CheckoutFinder:
    """Finds the packages that pyproject.toml's package-dir maps, before any installed copy."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _FOLDERS.get(fullname)
        if folder is None:
            return None
        where = TREE / folder
        return spec_from_file_location(fullname, where / "__init__.py", submodule_search_locations=[str(where)])


def use_checkout() -> None:
    """From now on import the library from this tree. No effect on what is imported already."""
    if CheckoutFinder not in sys.meta_path:
        sys.meta_path.insert(0, CheckoutFinder)
