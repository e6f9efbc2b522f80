"""The most recently used values under a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class ByteLru(Generic[Value]):
    """Keeps values until their sizes pass `budget` bytes, then drops the least recently used. Thread-safe.

    A value larger than the whole budget is handed out and not kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that the kept values take."""
        return self._nbytes

    def get(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`; when it is not kept, `make()` gives it with its size in bytes.

        Two threads that miss at once may both make it; one of the equal values is kept.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        # Under inference mode it would be of tensors that no later call can take a gradient through.
        with torch.inference_mode(False), torch.no_grad():
            value, nbytes = make()
        with self._lock:
            self._drop(key)
            if nbytes <= self.budget:
                self._values[key] = (value, nbytes)
                self._nbytes += nbytes
                while self._nbytes > self.budget:
                    self._drop(next(iter(self._values)))
        return value

    def peek(self, key: Hashable) -> tuple[Value, int] | None:
        """The value of `key` and its size in bytes where it is kept; it does not count as used."""
        with self._lock:
            return self._values.get(key)

    def items(self) -> list[tuple[Hashable, tuple[Value, int]]]:
        """Every key with its value and the value's size in bytes, the least recently used first."""
        with self._lock:
            return list(self._values.items())

    def discard(self, wanted: Callable[[Hashable], bool]) -> None:
        """Drop every key that `wanted` says True to."""
        with self._lock:
            for key in [key for key in self._values if wanted(key)]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        if key in self._values:
            self._nbytes -= self._values.pop(key)[1]
