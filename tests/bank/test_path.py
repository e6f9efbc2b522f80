"""The way of a mixed batch through the library stays short enough to read."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import dwm_fast
from dwm_fast.bank import MaskBank


def test_a_warm_mixed_batch_crosses_few_files() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    bank = MaskBank(net)
    bank.add("photo", {"0": torch.rand(64, 64) < 0.5, "2": torch.rand(8, 64) < 0.5})
    bank.add("art", {"0": torch.rand(64, 64) < 0.5})
    x, domains = torch.rand(4, 64), ["photo", "art", "photo", "art"]
    for _ in range(2):
        bank(x, domains=domains)
    roots = (str(Path(dwm_fast.__file__).parent), str(Path(dwm_fast.__file__).parents[1] / "kernels"))
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(roots):
            files.append(name)

    with torch.no_grad():
        sys.setprofile(note)
        try:
            bank(x, domains=domains)
        finally:
            sys.setprofile(None)
    assert len(files) > 10
    assert sum(a != b for a, b in itertools.pairwise(files)) <= 18
