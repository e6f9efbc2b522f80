"""What stands in for torch.cuda: each name must be torch's, each call must fit torch's signature."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .device import COUNT, GPU, FakeEvent, FakeStream

_SYNC_MODES = {"default": 0, "warn": 1, "error": 2}


class FakeDeviceGuard:
    """torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        self.idx = GPU.now().resolve(device).index
        self.prev_idx = -1

    def __enter__(self) -> None:
        gpu = GPU.now()
        self.prev_idx, gpu.device = gpu.device, self.idx
        gpu.guards.append(self.idx)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        GPU.now().device = self.prev_idx


class FakeGraph:
    """torch.cuda.CUDAGraph: replays what was recorded, on the memory that lies at the same place."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Callable[[], None]] = []

    def replay(self) -> None:
        gpu = GPU.now()
        gpu.log.append(("replay", gpu.stream()))
        with _disable_current_modes():
            for node in self.nodes:
                node()


class FakeGenerator:
    """A torch.Generator of torch.cuda.default_generators, after the names that are used of it."""

    def __init__(self) -> None:
        self.state = object()

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator()

    def graphsafe_set_state(self, new_state: FakeGenerator) -> FakeGenerator:
        self.state = new_state.state
        return self


class FakeCapture:
    """torch.cuda.graph: nothing of what is recorded happens."""

    def __init__(
        self,
        cuda_graph: FakeGraph,
        pool: Any = None,
        stream: FakeStream | None = None,
        capture_error_mode: str = "global",
        **kwargs: Any,
    ) -> None:
        self.cuda_graph = cuda_graph
        self.capture_stream = stream

    def __enter__(self) -> None:
        gpu = GPU.now()
        for own in gpu.defaults:
            merge_all(gpu, own)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(gpu.unchanged())
        self._stack.enter_context(use_stream(self.capture_stream or FakeStream(gpu.resolve())))
        merge_all(gpu, gpu.stream())
        gpu.capture, gpu.capturing_stream = self.cuda_graph.nodes, gpu.stream()

    def __exit__(self, *args: Any) -> None:
        gpu = GPU.now()
        gpu.capture = gpu.capturing_stream = None
        with _disable_current_modes():
            self._stack.close()


def merge_all(gpu: GPU, stream: FakeStream) -> None:
    """A wait for the whole device, as the start of a capture does."""
    for clock in [m.written for m in gpu.memory.values()]:
        gpu.host[clock[0]] = max(gpu.host.get(clock[0], 0), clock[1])
    for memory in gpu.memory.values():
        for reader, time in memory.read.items():
            gpu.host[reader] = max(gpu.host.get(reader, 0), time)


@contextlib.contextmanager
def use_stream(stream: FakeStream) -> Iterator[None]:
    gpu = GPU.now()
    before, gpu.current[stream.device.index] = gpu.current[stream.device.index], stream
    device, gpu.device = gpu.device, stream.device.index
    try:
        yield
    finally:
        gpu.current[stream.device.index], gpu.device = before, device


def _functions(gpu: GPU) -> dict[str, Callable[..., Any]]:
    def set_sync_debug_mode(debug_mode: int | str) -> None:
        gpu.sync_debug_mode = _SYNC_MODES[debug_mode] if isinstance(debug_mode, str) else debug_mode

    def synchronize(device: Any = None) -> None:
        gpu.wait(gpu.stream(device), "torch.cuda.synchronize")
        merge_all(gpu, gpu.stream(device))

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: gpu.device,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: f"Fake GPU {gpu.resolve(device).index}",
        "current_stream": gpu.stream,
        "default_stream": lambda device=None: gpu.defaults[gpu.resolve(device).index],
        "stream": use_stream,
        "synchronize": synchronize,
        "is_current_stream_capturing": gpu.is_capturing,
        "graph_pool_handle": lambda: (0, 1),
        "get_sync_debug_mode": lambda: gpu.sync_debug_mode,
        "set_sync_debug_mode": set_sync_debug_mode,
        "mem_get_info": lambda device=None: (2**34, 2**34),
    }


CLASSES = {
    "Stream": FakeStream,
    "Event": FakeEvent,
    "device": FakeDeviceGuard,
    "CUDAGraph": FakeGraph,
    "graph": FakeCapture,
}


def has_the_names_of(real: type, fake: type) -> None:
    """AssertionError unless every public method of `fake` is one of `real`, with parameters that torch's has."""
    for name, method in vars(fake).items():
        if name.startswith("_") and name not in ("__enter__", "__exit__", "__init__"):
            continue
        assert hasattr(real, name), f"{real} has no {name}"
        with contextlib.suppress(ValueError, TypeError):  # built in C, without a signature
            theirs = list(inspect.signature(getattr(real, name)).parameters.values())
            own = list(inspect.signature(method).parameters.values())
            named = {p.name for p in theirs}
            if not any(p.kind is p.VAR_POSITIONAL for p in (*theirs, *own)):
                assert {p.name for p in own if p.kind is not p.VAR_KEYWORD} <= named | {"self"}, (real, name, named)


def install(monkeypatch: pytest.MonkeyPatch, gpu: GPU) -> dict[str, Any]:
    """Put the stand-ins in torch.cuda; returns the functions, which record their calls."""
    made = {}
    for name, function in _functions(gpu).items():
        made[name] = create_autospec(getattr(torch.cuda, name), side_effect=function)
    for name, fake in CLASSES.items():
        has_the_names_of(getattr(torch.cuda, name), fake)
    has_the_names_of(torch.Generator, FakeGenerator)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(FakeGenerator() for _ in range(COUNT)))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        call = functools.partial(lambda name, device, pool: gpu.log.append((name, device, pool)), name)
        monkeypatch.setattr(torch._C, name, call)
    for name, value in {**made, **CLASSES}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made
