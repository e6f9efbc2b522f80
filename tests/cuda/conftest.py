"""The fixture `gpu`: inside a test, torch has two CUDA devices; kernels compute in Triton's interpreter."""

from __future__ import annotations

import collections
import functools
import operator
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports dwm_fast.kernels

import dwm_fast.ops
from dwm_fast.ops import _build

HERE = torch.cuda.is_available()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A GPU that is not there; see `device`, `tensors`, `launches` and `stand_ins`. Devices want their index here."""
    if HERE:
        pytest.skip("there is a GPU: tests/kernels runs on it, and Triton does not interpret")
    from triton.runtime.interpreter import InterpretedFunction

    from dwm_fast.kernels import _pointers, _tables
    from dwm_fast.nn import stored
    from dwm_fast.optim.folded import FoldedGradient

    from . import device, launches, stand_ins, tensors

    fake = device.GPU()
    fake.calls = stand_ins.install(monkeypatch, fake)
    # An earlier test may have found the CUDA extension in the user's cache, and imported what calls it.
    monkeypatch.delitem(_build._loaded, "cuda", raising=False)
    monkeypatch.delitem(sys.modules, "dwm_fast.ops._extension_cuda", raising=False)
    monkeypatch.delattr(dwm_fast.ops, "_extension_cuda", raising=False)
    monkeypatch.setitem(_build._refused, "cuda", "nvcc makes code for GPUs that are there")
    monkeypatch.setattr(InterpretedFunction, "run", launches.launch)
    monkeypatch.setattr(_tables, "ADDRESS", operator.methodcaller("data_ptr"))  # a DeviceTensor has its own
    for module, name in ((_tables, "_plans"), (_pointers, "_entries")):
        monkeypatch.setattr(module, name, collections.OrderedDict())
    for module in (_tables, _pointers):
        monkeypatch.setattr(module, "_kept", {})
    only_lift = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=) copies where no mode sees it
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    make = torch.Tensor._make_wrapper_subclass
    made = staticmethod(functools.partial(tensors.make_wrapper_subclass, make))
    monkeypatch.setattr(torch.Tensor, "_make_wrapper_subclass", made)
    monkeypatch.setattr(stored, "_PLAIN", (*stored._PLAIN, "DeviceTensor"))
    monkeypatch.setattr(FoldedGradient, "device", tensors.DeviceTensor.device, raising=False)
    forget()
    try:
        with torch.autograd.set_multithreading_enabled(False), tensors.DeviceMode(fake):
            yield fake
    finally:
        torch._C._set_only_lift_cpu_tensors(only_lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        device.GPU.installed = None
        forget()


def forget() -> None:
    """Clear what operations remember for a whole process: names of devices, backends that could not be had."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dwm_fast.ops"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
