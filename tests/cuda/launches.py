"""Triton's launch on a fake device: the checks of a real launch, then the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

from .device import GPU, MOST_BLOCKS, Launch, Memory, bytes_of
from .tensors import DeviceTensor, _hold, _release, changed, unwrapped

interpret = InterpretedFunction.run


def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """What takes the place of InterpretedFunction.run."""
    gpu = GPU.now()
    here = torch.device("cuda", gpu.device)
    size = tuple(grid)
    assert all(0 < n <= most for n, most in zip(size, MOST_BLOCKS, strict=False)), f"{kernel.__name__}: grid {size}"
    for t in tree_leaves((args, options)):
        if isinstance(t, Tensor) and not isinstance(t, DeviceTensor):
            raise ValueError(f"Pointer argument of {kernel.__name__} cannot be accessed from Triton (cpu tensor?)")
        assert not isinstance(t, DeviceTensor) or t.device == here, f"{kernel.__name__} on {here} was given {t.device}"
    gpu.launches.append(Launch(kernel.__name__, size, here, gpu.stream(), gpu.is_capturing()))
    with _disable_current_modes():
        given = tree_map(unwrapped, (args, options))
        _run(kernel, *given, grid=grid)
        if gpu.is_capturing():
            held = tree_map(_hold, given)
            assert gpu.capture is not None
            gpu.capture.append(lambda: _run(kernel, *tree_map(_release, held), grid=grid))


def _run(kernel: Any, args: Any, options: Any, *, grid: Any) -> None:
    gpu = GPU.now()
    touched = {id(m): m for m in _memories(kernel, args, options)}
    memories = list(touched.values())
    before = [bytes_of(m).clone() for m in memories]
    interpret(kernel, *args, grid=grid, warmup=False, **options)
    if gpu.is_capturing():
        return
    written = changed(memories, before)
    gpu.touch(gpu.stream(), [m for m in memories if m not in written], written)


def _memories(kernel: Any, args: Any, options: Any) -> list[Memory]:
    """Every allocation that a kernel may touch: its arguments, and those whose addresses lie in a table."""
    gpu = GPU.now()
    found = [gpu.memory_of(t) for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
    named = dict(zip(kernel.arg_names, args, strict=False))
    if "ptrs" in named:
        found += [gpu.at(address) for address in named["ptrs"].tolist()]
    return found
