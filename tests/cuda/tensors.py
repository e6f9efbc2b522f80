"""Tensors that say they are on a CUDA device: a wrapper subclass over CPU tensors, and the mode that computes on them.

Python reads `device` and `is_cuda` as on a GPU. Below Python they are on "meta": there autograd needs no driver, and
every transfer still comes by the mode. What torch refuses on a GPU (operands on two devices; waiting during a capture)
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from .device import GPU, Copy, FakeStream, Held, Memory, bytes_of

aten = torch.ops.aten

_WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero")
_MAY_INDEX_FROM_HOST = ("index", "index_put_", "_index_put_impl_")


class DeviceTensor(Tensor):
    """A tensor on a fake device; `inner` holds its values."""

    inner: Tensor
    where: torch.device
    device = property(lambda self: self.where)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            requires_grad=False,
        )
        made.inner, made.where = inner, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(DeviceTensor, other) for other in types):
            return NotImplemented  # the other subclass forms its values of ours
        raise AssertionError(f"{func} on a tensor of the fake device outside of the fixture that makes it")

    def get_device(self) -> int:
        return self.where.index

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        if id(self) not in memo:
            made = self.detach().clone()
            learned = isinstance(self, Parameter)
            memo[id(self)] = Parameter(made, self.requires_grad) if learned else made.requires_grad_(self.requires_grad)
        found: DeviceTensor = memo[id(self)]
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.where})"

    def record_stream(self, stream: FakeStream) -> None:
        assert isinstance(stream, FakeStream)
        GPU.now().recorded.append((self.inner.untyped_storage().data_ptr(), stream))


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def make_wrapper_subclass(make: Callable[..., Any], *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """torch.Tensor._make_wrapper_subclass, `make`, for wrappers of ours: they too are on "meta" below Python."""
    on_gpu = device is not None and torch.device(device).type == "cuda"
    made = make(*args, device="meta" if on_gpu else device, **kwargs)
    if on_gpu:
        made.where = torch.device(device)
    return made


class DeviceMode(TorchDispatchMode):
    """Computes on the CPU what is asked of the device, in the order of its streams."""

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mine = [t for t in given if isinstance(t, DeviceTensor)]
        if func.namespace == "dwm_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if any(type(t) not in (Tensor, Parameter, DeviceTensor) for t in given):
            return NotImplemented  # another subclass over ours: it forms its values, and we are asked again
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self.gpu.pinned
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            return self._pin(args[0])
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        asked = kwargs.get("device")
        if mine and asked is not None and torch.device(asked).type == "meta":
            asked = kwargs["device"] = mine[0].device  # below Python, what is made like a tensor is made on its device
        if asked is not None and torch.device(asked).type != "cuda":
            where = None
        else:
            where = self.gpu.resolve(asked) if asked is not None else mine[0].device if mine else None
        if not mine and where is None:
            return func(*args, **kwargs)
        return self._compute(func, args, kwargs, given, mine, where)

    def _pin(self, host: Tensor) -> Tensor:
        from torch.multiprocessing.reductions import StorageWeakRef

        pinned = host.clone()
        storage = pinned.untyped_storage()
        self.gpu.pinned[storage._cdata] = StorageWeakRef(storage)
        return pinned

    def _compute(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        mine: list[DeviceTensor],
        where: torch.device | None,
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        stream = self.gpu.stream(mine[0].device if mine else where)
        if func is aten._to_copy.default:
            self._copy(stream, args[0], where or torch.device("cpu"), bool(kwargs.get("non_blocking")))
        elif func is aten.copy_.default:
            self._copy(stream, args[1], args[0].device, bool(args[2]) if len(args) > 2 else False)
        else:
            self._same_device(name, given)
        if name in _WAITING or (name == "index" and any(t.dtype == torch.bool for t in given[1:])):
            self.gpu.wait(stream, name, implicit=True)
        if where is not None and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(unwrapped, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not func.is_view:
            touched = self._touched(func, args, mine, results if where is not None else [])
            if self.gpu.is_capturing():
                self._capture(func, inner_args, inner_kwargs, results, touched)
            else:
                self.gpu.touch(stream, *touched)
        if where is None:
            return out
        wrapped = tree_map(lambda t: DeviceTensor(t, where) if isinstance(t, Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if mine else wrapped

    def _same_device(self, name: str, given: list[Tensor]) -> None:
        counted = given[:1] if name in _MAY_INDEX_FROM_HOST else given
        found = {t.device for t in counted if t.dim() or t.is_cuda}
        if len(found) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({name})")

    def _copy(self, stream: FakeStream, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        """A copy between host and device; within a device there is nothing to say."""
        if source.is_cuda == (target.type == "cuda"):
            return
        pinned = not source.is_cuda and source.untyped_storage()._cdata in self.gpu.pinned
        self.gpu.copies.append(Copy("to host" if source.is_cuda else "to device", pinned, non_blocking, stream))
        if not non_blocking or source.is_cuda:
            self.gpu.wait(stream, "copy", implicit=True)
        elif not pinned and self.gpu.is_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (pageable copy)")

    def _touched(
        self, func: Any, args: Any, mine: list[DeviceTensor], results: list[Tensor]
    ) -> tuple[list[Memory], list[Memory]]:
        """What an operation reads, and what it writes: arguments that its schema marks, and fresh results."""
        marked = [
            t
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value)
            if isinstance(t, DeviceTensor)
        ]
        written = {id(m): m for m in (self.gpu.memory_of(t.inner) for t in marked)}
        written |= {id(m): m for m in map(self.gpu.memory_of, results) if m.written[1] == 0}
        read = {id(m): m for m in (self.gpu.memory_of(t.inner) for t in mine)}
        return [m for key, m in read.items() if key not in written], list(written.values())

    def _capture(
        self, func: Any, args: Any, kwargs: Any, results: list[Tensor], touched: tuple[list[Memory], list[Memory]]
    ) -> None:
        """Put an operation into the graph that is being captured."""
        held, targets = tree_map(_hold, (args, kwargs)), [Held(t) for t in results]

        def replay() -> None:
            again_args, again_kwargs = tree_map(_release, held)
            again = [t for t in tree_leaves(func(*again_args, **again_kwargs)) if isinstance(t, Tensor)]
            for target, result in zip(targets, again, strict=True):
                if target.tensor().data_ptr() != result.data_ptr():
                    target.tensor().copy_(result)
            self.gpu.touch(self.gpu.stream(), *touched)

        assert self.gpu.capture is not None
        self.gpu.capture.append(replay)


def _hold(value: Any) -> Any:
    return Held(value) if isinstance(value, Tensor) else value


def _release(value: Any) -> Any:
    return value.tensor() if isinstance(value, Held) else value


def changed(memories: list[Memory], before: list[Tensor]) -> list[Memory]:
    """Allocations whose bytes are not what they were."""
    return [m for m, b in zip(memories, before, strict=True) if not torch.equal(bytes_of(m), b)]
