"""capture_step: a whole training step as one CUDA graph; where there is no GPU, the same step run eagerly."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dwm_fast.errors import DwmError, InputError

Stateful = nn.Module | torch.optim.Optimizer | Tensor


class CaptureError(DwmError, RuntimeError):
    """A step cannot become a CUDA graph."""


class CapturedStep:
    """What `capture_step` returns; call it with a batch to run the step.

    Attributes:
        captured: True where calls replay a CUDA graph, False where they run the step eagerly.
        eager: the step itself, for a batch of another size.
    """

    def __init__(self, step: Callable[..., Any], examples: tuple[Tensor, ...]) -> None:
        self.eager = step
        self.captured = False
        self._expected = [(x.shape, x.dtype) for x in examples]
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def _warm_up(self, examples: tuple[Tensor, ...], stream: torch.cuda.Stream, warmup: int) -> None:
        """Run the step on copies of `examples`, on the stream of the capture."""
        device = stream.device
        self._inputs = tuple(x.to(device, copy=True) for x in examples)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for left in reversed(range(warmup)):
                    # First runs may set things up and wait; by the last one, a step that waits always will.
                    with _no_waiting() if left == 0 else contextlib.nullcontext():
                        self.eager(*self._inputs)
        finally:
            # A step that raised has left work behind; what is restored next must not overtake it.
            torch.cuda.current_stream(device).wait_stream(stream)

    def _record(self, stream: torch.cuda.Stream) -> None:
        # The warm-up's stream: what it left alive of autograd's graph adds up gradients there, and nowhere else.
        device = stream.device
        graph, outer = torch.cuda.CUDAGraph(), sys.exception()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream):
                self._outputs = _detached(self.eager(*self._inputs))
        except (RuntimeError, InputError) as error:  # the step has run: what it refuses now, it refuses to be captured
            _abandon(pool, device)
            reason = _first_line(_cause(error, outer))
            raise CaptureError(f"the step cannot be captured as a CUDA graph ({reason}); {_advice(reason)}") from error
        self._graph = graph
        self.captured = True

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the step on a batch shaped like the examples.

        Returns what the step returns, detached. When captured, these are the graph's own tensors, the same at
        every call: clone what must outlive the next one.
        """
        given = [(x.shape, x.dtype) for x in inputs]
        if given != self._expected:
            raise InputError(
                f"the step was made for {_describe(self._expected)} and was given {_describe(given)}; drop "
                f"the loader's last short batch (drop_last=True) or call .eager on it"
            )
        if self._graph is None:
            return _detached(self.eager(*inputs))
        for mine, theirs in zip(self._inputs, inputs, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self._graph.replay()
        return self._outputs


def capture_step(
    step: Callable[..., Any],
    *examples: Tensor,
    warmup: int = 3,
    restore: Iterable[Stateful] = (),
    device: torch.device | str | None = None,
) -> CapturedStep:
    """Make one call of a whole training step (forward, backward, optimiser) a single CUDA graph replay.

    Mask noise, step counts and learning rates of `dwm_fast` live on the device, so every replay draws new
    masks and follows the scheduler. Start the step with `optimizer.zero_grad()` (set_to_none=True, the default).

    Args:
        step: function of tensors; returns tensors in any nesting. It must not wait for the device.
        examples: a batch, of the shape and dtype of every later one. On a GPU it decides the device.
        warmup: real steps run on the examples before the capture, at least 2 (the first may set things up);
            the capture itself runs none.
        restore: modules, optimisers and tensors that are put back after the warm-up to what they were before,
            so that the first call is the first step. State that an optimiser made meanwhile is set to zero,
            and gradients are dropped.
        device: where the graph runs; the first example's by default. Anything but CUDA: calls run `step`
            eagerly and no warm-up is run.

    Raises:
        InputError: examples that are no tensors, warmup below 2, or no example and no device.
        CaptureError: the step waits for the device or cannot be captured for another reason.

    Example:
        >>> import torch
        >>> from dwm_fast.graphs import capture_step
        >>> double = capture_step(lambda x: x * 2, torch.zeros(2))
        >>> double(torch.ones(2)).tolist(), double.captured
        ([2.0, 2.0], False)
    """
    if not all(isinstance(x, Tensor) for x in examples):
        raise InputError("capture_step takes tensors as examples; bind anything else with functools.partial")
    if warmup < 2:
        raise InputError(f"warmup is {warmup}; expected at least 2")
    if device is None and not examples:
        raise InputError("capture_step got no example and no device; give device= for a step without inputs")
    where = torch.device(device) if device is not None else examples[0].device
    captured = CapturedStep(step, examples)
    if where.type != "cuda":
        return captured
    stream = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
    with _restored(list(restore)):
        captured._warm_up(examples, stream, warmup)
    captured._record(stream)
    return captured


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CaptureError(
            "the step waits for the device, which a CUDA graph cannot: look in the traceback above for "
            ".item(), .cpu(), float(), print or a choice by a tensor's value, and take it out of the step"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """What went wrong first: torch ends a broken capture with an error that says only that it is broken."""
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return error


def _advice(reason: str) -> str:
    if "another stream" in reason:
        return (
            "drop what is left of earlier steps first: a loss or an output that still has its graph (keep it detached)"
        )
    return "everything in it must stay on the device: no .item(), .cpu(), print, no choice by a tensor's value"


def _abandon(pool: tuple[int, int], device: torch.device) -> None:
    """Undo what torch leaves behind where CUDA breaks a capture off, so that the process can go on without a graph.

    Its generator believes itself inside the capture and refuses every draw until its state is another object; its
    allocator keeps back the capture's memory, and blocks that other streams have used.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(RuntimeError):  # ended already, where the step raised and no capture was broken
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)


def _tensors(thing: Stateful) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, nn.Module):
        return [*thing.parameters(), *thing.buffers()]
    held = [x for state in thing.state.values() for x in state.values()]
    held += [x for group in thing.param_groups for x in (*group["params"], *group.values())]
    return [x for x in held if isinstance(x, Tensor)]


@contextlib.contextmanager
def _restored(things: list[Stateful]) -> Iterator[None]:
    """Put every tensor of `things` back at the end, zero those that came into being, and drop gradients."""
    before = {x: x.detach().clone() for thing in things for x in _tensors(thing)}
    optimizers = [thing for thing in things if isinstance(thing, torch.optim.Optimizer)]
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    try:
        yield
    finally:
        _put_back({x for thing in things for x in _tensors(thing)}, before)
        for group, rate in rates:
            if isinstance(group["lr"], Tensor) and not isinstance(rate, Tensor):
                group["lr"].fill_(rate)


@torch.no_grad()
def _put_back(tensors: set[Tensor], before: dict[Tensor, Tensor]) -> None:
    for x in tensors:
        x.grad = None
        if x in before:
            x.copy_(before[x])
        else:
            x.zero_()


def _detached(outputs: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, outputs)


def _describe(signature: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{dtype} of shape {tuple(shape)}" for shape, dtype in signature) or "no inputs"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
