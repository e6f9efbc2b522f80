"""The same cases under pytest-benchmark: python -m pytest benchmarks [--benchmark-json=FILE] [-k sample]

Ours and the first rival of every case, grouped by case and run after its gate; `python -m benchmarks.dev.run` has
them all.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.cases import ENTRIES, Entry
from benchmarks.context import Context
from benchmarks.measure import Case

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_HERE = [e for e in ENTRIES if _DEVICE.type in e.devices]


@functools.lru_cache(maxsize=1)
def _gated(entry: Entry) -> Case:
    case = entry.build(Context(_DEVICE, quick=True))
    case.gate()
    return case


@pytest.mark.parametrize("entry", _HERE, ids=[e.name for e in _HERE])
@pytest.mark.parametrize("kind", ["rival", "ours"])
def test_speed(entry: Entry, kind: str, benchmark: Any) -> None:
    case = _gated(entry)
    way = next(w for w in case.ways if w.is_ours == (kind == "ours"))
    benchmark.group = entry.name
    benchmark.extra_info.update(case.parameters, way=way.name)
    run = way.make()

    def once() -> None:
        run()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, warmup_rounds=2)
