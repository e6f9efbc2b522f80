"""The ways of a call through the library stay short enough to read: what is entered, and how often the file changes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import dwm_fast as dwm
from dwm_fast.bank import MaskBank
from dwm_fast.ops import backends

ROOTS = tuple(str(Path(dwm.__file__).parents[1] / room) for room in ("dwm_fast", "kernels"))


def walk(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """File and name of each function, and comprehension, of the library that a warm `call` enters, in order."""
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOTS):
            entered.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    for _ in range(2):
        call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def changes_of_file(entered: list[tuple[str, str]]) -> int:
    return sum(a != b for (a, _), (b, _) in itertools.pairwise(entered))


def functions(entered: list[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(file, name) for file, name in entered if not name.endswith(("comp>", "genexpr>"))}


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize(("backend", "most_changes", "most_functions"), [(None, 16, 36), ("reference", 23, 45)])
def test_masked_layers_in_training_are_a_short_way_from_what_computes(
    backend: str | None, most_changes: int, most_functions: int
) -> None:
    masked, x = dwm.mask_model(two_layers(), dwm.GumbelSigmoid()).train(), torch.rand(4, 64)
    with dwm.use_backend(backend):
        assert backends.chosen("sample", "cpu") == (backend or "cpp")
        entered = walk(lambda: masked(x))
    assert changes_of_file(entered) <= most_changes
    assert 20 < len(functions(entered)) <= most_functions


def test_more_layers_make_no_longer_way() -> None:
    two, x = dwm.mask_model(two_layers(), dwm.GumbelSigmoid()).train(), torch.rand(4, 64)
    eight = dwm.mask_model(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), dwm.GumbelSigmoid()).train()
    short, long = walk(lambda: two(x)), walk(lambda: eight(x))
    assert len(long) > len(short)
    assert functions(long) == functions(short)
    assert changes_of_file(long) == changes_of_file(short)


def test_a_warm_mixed_batch_crosses_few_files() -> None:
    bank = MaskBank(two_layers())
    bank.add("photo", {"0": torch.rand(64, 64) < 0.5, "2": torch.rand(8, 64) < 0.5})
    bank.add("art", {"0": torch.rand(64, 64) < 0.5})
    x, domains = torch.rand(4, 64), ["photo", "art", "photo", "art"]
    with torch.no_grad():
        entered = walk(lambda: bank(x, domains=domains))
    assert len(entered) > 10
    assert changes_of_file(entered) <= 15
