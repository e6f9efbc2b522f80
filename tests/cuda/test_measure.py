"""The clock of a GPU, as far as it is seen without one."""

from __future__ import annotations

import gc
import weakref

import torch

from benchmarks.measure import Way, _GpuClock


class Call:
    """A call that owns what it writes to."""

    def __init__(self) -> None:
        self.owned = torch.zeros(8, device="cuda:0")

    def __call__(self) -> torch.Tensor:
        return self.owned.add_(1)


def test_what_a_captured_call_reads_and_writes_lives_as_long_as_its_clock(gpu):
    call = Call()
    alive = weakref.ref(call)
    clock = _GpuClock(Way("ours", Call, graph=True), call, 2, lambda: None)
    del call
    gc.collect()
    assert alive() is not None
    clock.run()
    del clock
    gc.collect()
    assert alive() is None
