"""A plugin of pytest for machines where nothing can be installed: what tests import may be missing.

Without hypothesis its place is taken by names that mean nothing: a test that draws from it is left out with that
reason, and the others of its file are run. Without pytest-timeout the mark `timeout` means nothing. With --part 2/3
every third test is run, from the second on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


class _Nothing:
    """Whatever is asked of it, called or chained: itself."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **options: Any) -> _Nothing:
        return self

    def __or__(self, other: object) -> _Nothing:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Unchanged(_Nothing):
    """hypothesis.settings and others that decorate: the function stays as it is."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self


def _given(*args: Any, **options: Any) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="hypothesis is not installed")


class _Module(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


def stand_in() -> dict[str, ModuleType]:
    """Modules that take hypothesis's place."""
    modules: dict[str, ModuleType] = {
        name: _Module(name) for name in ("hypothesis", "hypothesis.strategies", "hypothesis.extra")
    }
    top = modules["hypothesis"]
    names = {"given": _given, "settings": _Unchanged(), "example": _Unchanged(), "seed": _Unchanged()}
    vars(top).update(names, strategies=modules["hypothesis.strategies"], __path__=[])
    return modules


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="I/N: run the tests I, I + N, I + 2 N, ...")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != part - 1])
    items[:] = items[part - 1 :: parts]


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: of no effect without pytest-timeout")


try:
    importlib.import_module("hypothesis")
except ImportError:
    sys.modules.update(stand_in())
