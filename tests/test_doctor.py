"""doctor: what works here, what does not, and what to type."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest
import torch

import dwm_fast
from dwm_fast import doctor
from dwm_fast.doctor import diagnose
from dwm_fast.ops import backends


def test_versions_and_device_come_first() -> None:
    first, second = diagnose()[:2]
    for version in (dwm_fast.__version__, platform.python_version(), torch.__version__):
        assert version in first
    assert second.startswith("GPU: ")
    assert ("none that torch can use" in second) != torch.cuda.is_available()


def test_every_operation_shown_has_a_backend_that_exists() -> None:
    lines = diagnose()
    start = lines.index("operations on cpu:")
    named = dict(line.strip().split(": ") for line in lines[start + 1 : start + 1 + len(doctor._SHOWN)])
    assert set(named) == set(doctor._SHOWN)
    assert set(named.values()) <= set(backends.BACKENDS)


def test_a_forced_backend_is_said() -> None:
    with dwm_fast.use_backend("reference"):
        lines = diagnose()
    assert any("forced to 'reference'" in line for line in lines)
    assert {line.split(": ")[1] for line in lines if line.startswith("  ")} == {"reference"}


def test_a_missing_package_comes_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "constriction":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (line,) = [line for line in diagnose() if line.startswith("constriction")]
    assert "not installed" in line
    assert "pip install 'dwm-fast[coding]'" in line


def test_a_backend_that_is_not_used_says_why_and_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {op: {"cpp": "ready", "triton": "no module named triton"} for op in doctor._SHOWN}
    answers["pack"]["cpp"] = "compiler too old"
    monkeypatch.setattr(backends, "availability", answers.__getitem__)
    lines = diagnose()
    assert "backend triton is not used: no module named triton" in lines
    assert "backend cpp is not used for pack: compiler too old" in lines


def test_a_forced_backend_that_cannot_run_is_a_diagnosis_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'somewhere'")

    monkeypatch.setitem(backends._TABLE, "cpp", absent)
    backends._loaded.cache_clear()
    try:
        with dwm_fast.use_backend("cpp"):
            (line,) = [line for line in diagnose() if line.startswith("  pack: ")]
    finally:
        backends._loaded.cache_clear()
    assert line.startswith("  pack: cannot run: backend 'cpp' was asked for")
