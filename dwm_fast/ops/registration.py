"""How an operation is registered with torch: schema, fake, and one kernel that asks the table of backends.

Schemas are flat, as torch wants them. Behind them a draw and a convolution's geometry travel as one value each:
`define` regroups, once, for fakes and every backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwm_fast.errors import InputError, Unsupported
from dwm_fast.ops import backends, ways
from dwm_fast.ops.autocast import without_autocast
from dwm_fast.ops.devices import check_all_devices
from dwm_fast.ops.draw import Draw
from dwm_fast.ops.geometry import Geometry

_LIBRARY = torch.library.Library("dwm_fast", "DEF")  # type: ignore[no-untyped-call]

_VALUES: tuple[tuple[str, Callable[..., Any]], ...] = (
    (Draw.SCHEMA, Draw),
    (Draw.SCHEMA_OF_ONE, Draw.of_one),
    (Geometry.SCHEMA, Geometry),
)


_DIRECT: dict[str, Callable[..., Any]] = {}
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_USUAL = _PLAIN | {bool, int, float, str, type(None), torch.dtype}


def call(name: str, *values: Any) -> Any:
    """Operation `name` where no gradient is wanted; its arguments, a `Draw` whole.

    Where nothing listens at torch's dispatcher it is passed by: it costs about a microsecond a tensor of a list.
    """
    if _somebody_listens(values):
        return getattr(torch.ops.dwm_fast, name)(*_flat(values))
    return _DIRECT[name](*values)


def _flat(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as torch's schema takes them."""
    return tuple(part for value in values for part in (value.flat() if isinstance(value, Draw) else (value,)))


def _somebody_listens(values: tuple[Any, ...]) -> bool:
    """Whether a compiler, a mode, a transform, a profiler or a tensor subclass is to see the operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or not all(
            type(x) in _USUAL
            or (type(x) is list and _PLAIN.issuperset(map(type, x)))
            or (type(x) is Draw and type(x.rng_state) in _PLAIN and type(x.tau) in _PLAIN)
            for x in values
        )
    )


def _regroup(schema: str, device_at: int) -> tuple[Callable[[tuple[Any, ...]], tuple[Any, ...]], int]:
    """What makes the values above of an operation's flat arguments, and where argument `device_at` is then."""
    places = []
    for text, make in _VALUES:
        before, found, _ = schema.replace("int mask_mode", "int mode").partition(text)
        if found:
            places.append((before.count(","), text.count(",") + 1, make))
    places.sort(key=lambda place: place[0], reverse=True)

    def grouped(args: tuple[Any, ...]) -> tuple[Any, ...]:
        for start, count, make in places:
            args = (*args[:start], make(*args[start : start + count]), *args[start + count :])
        return args

    at = device_at
    for start, count, _ in places:
        if start <= device_at:
            at -= min(count - 1, device_at - start)
    return grouped, at


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    device_at: int = 0,
    operands: Callable[..., tuple[Any, ...]] | None = None,
    one_backend: bool = False,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> None:
    """Register `schema` under the namespace dwm_fast.

    `reference` is the specification in plain PyTorch, the backend that runs anywhere; it, `fake` and every backend
    take the schema's arguments with a `Draw` and a `Geometry` in the place of their parts. A backend that raises
    `Unsupported` leaves these tensors to it. The device of argument number `device_at` (of its first tensor, where it
    is a list) decides between backends. Autocast is off inside: an operation computes in the dtypes it was given, and
    whoever calls it reads autocast's.

    A masked product gives `operands`: from its arguments to those of `ways.choose_for` behind the backend. Its
    reference is the staged way, and a backend computes it in one pass, with the problem as its first argument.

    With `one_backend` the reference is the only one, whatever is forced.
    """
    name = schema.partition("(")[0]
    grouped, at = _regroup(schema, device_at)
    backends.REFERENCES[name] = reference
    _LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def kernel(*args: Any) -> Any:
        return direct(*grouped(args))

    def direct(*given: Any) -> Any:
        device = _device(given[at])
        backend, implementation = backends.chosen_for(name, device.type)
        # A list of the Triton backend is looked through where a new table of its addresses is made.
        if not _together(given, device, lists=backend != "triton" or device.type != "cuda"):
            check_all_devices(name, _flat(given), device)
        off = device.type != "meta" and torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if off else contextlib.nullcontext():
            if operands is not None:
                choice = ways.choose_for(name, backend, *operands(*given))
                return reference(*given) if choice.way == ways.STAGED else implementation(choice.problem, *given)
            try:
                return implementation(*given)
            except Unsupported:
                return reference(*given)

    def shapes(*args: Any) -> Any:
        with without_autocast(_device(args[device_at]).type):
            return fake(*grouped(args))

    _DIRECT[name] = reference if one_backend else direct
    flat = reference if one_backend else kernel
    _LIBRARY.impl(name, flat, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dwm_fast::{name}", shapes, lib=_LIBRARY)


def _together(args: tuple[Any, ...], device: torch.device, lists: bool) -> bool:
    """Whether all tensors among the arguments, and in their lists, are on `device`."""
    for given in args:
        if isinstance(given, Tensor):
            if given.device != device:
                return False
        elif isinstance(given, Draw):
            if given.rng_state.device != device or given.tau.device != device:
                return False
        elif lists and isinstance(given, list | tuple):
            for t in given:
                if isinstance(t, Tensor) and t.device != device:
                    return False
    return True


def _device(given: Tensor | Draw | Sequence[Tensor]) -> torch.device:
    """Where a tensor lies, the noise of a draw, or the first of a list; an empty list is on the CPU."""
    if isinstance(given, Tensor):
        return given.device
    if isinstance(given, Draw):
        return given.rng_state.device
    return given[0].device if given else torch.device("cpu")


def refuse_double_backward(name: str) -> None:
    """Give the operation `name`, a backward pass, a gradient that is one clear error."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise InputError(
            f"torch.ops.dwm_fast.{name} is a backward pass and has no gradient of its own: masked products are "
            "differentiable once; leave out create_graph=True, or differentiate a plain layer over "
            "ops.sample's masked weight"
        )

    torch.library.register_autograd(f"dwm_fast::{name}", refuse)
