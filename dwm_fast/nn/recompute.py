"""What a forward pass drew, found again when activation checkpointing runs that forward a second time.

`torch.utils.checkpoint` drops activations and calls the same function again inside the backward pass. Its own objects
tell which first call a second one belongs to: the context of a reentrant checkpoint, the frame object of the other
kind. They are found on the Python stack, under which both calls run; what was drawn lives as long as they do.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from dwm_fast.errors import InputError

_FILE = torch.utils.checkpoint.__file__

_Value = TypeVar("_Value")

saved_tensors_hooks = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)
"""The hooks in force, or None; a checkpoint that is not reentrant runs under some. Every layer asks, so it is cheap."""

_UNKNOWN = (
    "a masked weight was asked for during a backward pass, and it is not known which forward pass is being repeated; "
    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) around layers, or either kind around a whole "
    "masked model"
)


class _Drawn:
    """What one checkpointed call drew: for each owner its values in order, and how far a second call has come."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], list[Any]] = {}
        self._next: dict[tuple[int, str], int] = {}
        self._run: object = None

    def start(self, run: object) -> _Drawn:
        """The same, read from its start if `run`, which names a second call, is a new one."""
        if run != self._run:
            self._run, self._next = run, {}
        return self

    def again(self, owner: tuple[int, str]) -> Any:
        """The owner's next value; None where there is none."""
        values, place = self.values.get(owner, []), self._next.get(owner, 0)
        self._next[owner] = place + 1
        return values[place] if place < len(values) else None


_calls: weakref.WeakKeyDictionary[Any, _Drawn] = weakref.WeakKeyDictionary()


def _enclosing() -> tuple[list[_Drawn], _Drawn | None]:
    """The checkpointed calls that run for the first time, innermost first, and the one around them that runs again."""
    first: list[_Drawn] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            name, local = frame.f_code.co_name, frame.f_locals
            if name == "unpack_hook":
                return first, _calls.setdefault(local["frame"], _Drawn()).start(local["gid"])
            if name == "backward" and "ctx" in local:
                run = torch._C._current_graph_task_id()
                return first, _calls.setdefault(local["ctx"], _Drawn()).start(run)
            if name == "forward" and "ctx" in local:
                first.append(_calls.setdefault(local["ctx"], _Drawn()))
            elif "gen" in local:
                first.append(_calls.setdefault(local["gen"].gi_frame.f_locals["new_frame"], _Drawn()))
        frame = frame.f_back
    return first, None


def in_backward() -> bool:
    """Whether a backward pass is running in this thread, and so a forward pass now is a second one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def pinned(owner: object, draw: Callable[[], _Value]) -> _Value:
    """What `draw()` gives; where a checkpoint runs the owner's forward again, what it gave the first time.

    Raises:
        InputError: a backward pass runs this forward, and no first pass of it is known.
    """
    repeated = in_backward()
    # A reentrant checkpoint runs without gradients, the other kind under saved-tensor hooks.
    if torch.compiler.is_compiling() or not (
        repeated or saved_tensors_hooks() is not None or not torch.is_grad_enabled()
    ):
        return draw()
    first, again = _enclosing()
    value: _Value | None = again.again((id(owner), "draw")) if again is not None else None
    if value is None:
        if repeated or again is not None:
            raise InputError(_UNKNOWN)
        value = draw()
    for call in first:
        call.values.setdefault((id(owner), "draw"), []).append(value)
    return value


def remember(owner: object, weight: Any) -> bool:
    """Take down what a masked model made for its layer `owner` (its masked weight), should a checkpoint run it again.

    Returns whether a checkpoint is running it for the first time.
    """
    first = _enclosing()[0]
    for call in first:
        call.values.setdefault((id(owner), "weight"), []).append(weight)
    return bool(first)


def recall(owner: object, draws: bool) -> Any:
    """What `remember` took down in the forward pass that a checkpoint now repeats; None outside of that.

    Raises:
        InputError: the weight is not known, and the owner does not draw for itself.
    """
    if torch.compiler.is_compiling() or not (in_backward() or saved_tensors_hooks() is not None):
        return None
    first, again = _enclosing()
    weight = again.again((id(owner), "weight")) if again is not None else None
    if weight is None and again is not None and not draws:
        raise InputError(_UNKNOWN)
    if weight is not None:
        for call in first:
            call.values.setdefault((id(owner), "weight"), []).append(weight)
    return weight
