"""A CUDA device that is not there: streams, what each has waited for, who touched which memory, and a capture.

Order is kept by vector clocks. Work on a stream comes after all that the stream waited for and all that the host waited
for before it was issued; memory that another stream wrote (or, for a write, read) without such an order is a `Race`.
Real GPUs answer a race with wrong numbers now and then; here it is always an error.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Clock = dict["FakeStream", int]

COUNT = 2
"""Devices: two, so that a launch without its device guard is seen."""
MOST_BLOCKS = (2**31 - 1, 65_535, 65_535)


class Race(AssertionError):
    """Two streams touch the same memory in no order."""


class FakeStream:
    """A stream, with the names of torch.cuda.Stream."""

    def __init__(self, device: object = None, priority: int = 0, **kwargs: object) -> None:
        self._gpu = GPU.now()
        self.device = self._gpu.resolve(device)
        self.cuda_stream = self._gpu.next_stream()
        self.clock: Clock = {self: 0}

    def wait_event(self, event: FakeEvent) -> None:
        merge(self.clock, event.clock)
        self._gpu.log.append(("wait_event", self))

    def wait_stream(self, stream: FakeStream) -> None:
        merge(self.clock, stream.clock)
        self._gpu.log.append(("wait_stream", self, stream))

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.wait(self, "Stream.synchronize")


class FakeEvent:
    """An event, with the names of torch.cuda.Event."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        gpu = GPU.now()
        stream = stream or gpu.stream()
        self.clock = dict(stream.clock)
        gpu.log.append(("record_event", stream))


def merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


@dataclasses.dataclass
class Memory:
    """One allocation: who wrote it last, who has read it since; never freed as long as `storage` lives."""

    storage: StorageWeakRef
    address: int
    nbytes: int
    written: tuple[FakeStream, int]
    read: Clock = dataclasses.field(default_factory=dict)
    graph: object = None


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel that was launched."""

    kernel: str
    grid: tuple[int, ...]
    device: torch.device
    stream: FakeStream
    captured: bool


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy between host and device."""

    direction: str
    pinned: bool
    non_blocking: bool
    stream: FakeStream


class GPU:
    """All that a test may ask about; `now()` is the one that is installed."""

    installed: GPU | None = None

    def __init__(self) -> None:
        GPU.installed = self
        self.log: list[tuple[object, ...]] = []
        self.launches: list[Launch] = []
        self.copies: list[Copy] = []
        self.recorded: list[tuple[int, FakeStream]] = []  # Tensor.record_stream: address, stream
        self.syncs: list[str] = []
        self.memory: dict[int, Memory] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.host: Clock = {}
        self.device = 0
        self.guards: list[int] = []
        self.sync_debug_mode = 0
        self.capture: list[Callable[[], None]] | None = None
        self.capturing_stream: FakeStream | None = None
        self._streams = 0
        self.defaults = [FakeStream(torch.device("cuda", i)) for i in range(COUNT)]
        self.current = list(self.defaults)

    @staticmethod
    def now() -> GPU:
        assert GPU.installed is not None
        return GPU.installed

    def next_stream(self) -> int:
        self._streams += 1
        return self._streams

    def resolve(self, device: object = None) -> torch.device:
        """A device with its index; the current one by default."""
        if device is None:
            return torch.device("cuda", self.device)
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)  # type: ignore[call-overload]
        return torch.device("cuda", self.device) if found.index is None else found

    def stream(self, device: object = None) -> FakeStream:
        return self.current[self.resolve(device).index]

    def is_capturing(self) -> bool:
        return self.capturing_stream is not None and self.stream() is self.capturing_stream

    def wait(self, stream: FakeStream, what: str, *, implicit: bool = False) -> None:
        """The host waits for a stream."""
        if self.is_capturing():
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if implicit and self.sync_debug_mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        self.syncs.append(what)
        merge(self.host, stream.clock)

    # --- memory -------------------------------------------------------------------------------------------------

    def memory_of(self, inner: Tensor) -> Memory:
        """The record of a tensor's allocation, new ones belonging to the current stream."""
        storage = inner.untyped_storage()
        found = self.memory.get(storage._cdata)
        if found is None:
            stream = self.stream()
            found = Memory(StorageWeakRef(storage), storage.data_ptr(), storage.nbytes(), (stream, 0))
            found.graph = self.capture
            self.memory[storage._cdata] = found
        return found

    def at(self, address: int) -> Memory:
        """The live allocation that holds an address."""
        live = sorted((m for m in self.memory.values() if not m.storage.expired()), key=lambda m: m.address)
        i = bisect.bisect_right([m.address for m in live], address) - 1
        if i < 0 or address >= live[i].address + max(live[i].nbytes, 1):
            raise AssertionError(f"a kernel was given the address {address:#x}, where no tensor of the device lives")
        return live[i]

    def touch(self, stream: FakeStream, reads: list[Memory], writes: list[Memory]) -> None:
        """One piece of work on a stream; Race where its memory is another stream's and not waited for."""
        merge(stream.clock, self.host)
        for m in (*reads, *writes):
            writer, time = m.written
            if writer is not stream and stream.clock.get(writer, 0) < time:
                raise Race(
                    f"stream {stream.cuda_stream} uses what stream {writer.cuda_stream} may not have written yet"
                )
        for m in writes:
            for reader, time in m.read.items():
                if reader is not stream and stream.clock.get(reader, 0) < time:
                    raise Race(
                        f"stream {stream.cuda_stream} overwrites what stream {reader.cuda_stream} may still read"
                    )
        stream.clock[stream] += 1
        for m in reads:
            m.read[stream] = stream.clock[stream]
        for m in writes:
            m.written, m.read = (stream, stream.clock[stream]), {}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Memory that lives now holds the same bytes at the end: a capture runs nothing."""
        before = {cdata: bytes_of(m).clone() for cdata, m in self.memory.items() if not m.storage.expired()}
        try:
            yield
        finally:
            for cdata, content in before.items():
                if not self.memory[cdata].storage.expired():
                    bytes_of(self.memory[cdata]).copy_(content)


def bytes_of(memory: Memory) -> Tensor:
    """An allocation as uint8."""
    storage = torch.UntypedStorage._new_with_weak_ptr(memory.storage.cdata)
    if storage is None:
        raise AssertionError("a graph reads memory that was freed since its capture; nothing keeps it")
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


class Held:
    """A tensor of a graph: its own memory is kept, all other is looked up again, as an address is."""

    def __init__(self, inner: Tensor) -> None:
        gpu = GPU.now()
        self.memory = gpu.memory_of(inner)
        own = self.memory.graph is not None and self.memory.graph is gpu.capture
        self.kept = inner if own else None
        self.place = (inner.storage_offset(), inner.size(), inner.stride())
        self.dtype = inner.dtype

    def tensor(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        storage = bytes_of(self.memory).untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)  # type: ignore[call-overload]
