"""A training step as one CUDA graph where the batches are on a GPU; elsewhere, the step as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from torch import Tensor

from dwm_fast.graphs import CapturedStep, CaptureError, Stateful, capture_step

Step = Callable[[Tensor, Tensor], Tensor]


class FastStep:
    """Runs `step(images, labels) -> loss` (0-dim, detached), captured at its first batch if that is on a GPU.

    Batches of another shape than the first run eagerly, and so do all where the capture fails, after one warning.
    On a GPU the loss is overwritten by the next call.

    Args:
        step: a whole training step, from zero_grad to the optimiser's.
        restore: modules and optimisers whose state the capture's warm-up must leave as it was.
    """

    def __init__(self, step: Step, restore: Iterable[Stateful]) -> None:
        self._step = step
        self._restore = list(restore)
        self._captured: CapturedStep | None = None
        self._shapes: tuple[object, ...] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if not _on_gpu(images):
            return self._step(images, labels)
        shapes = (images.shape, images.dtype, labels.shape, labels.dtype)
        if self._shapes is None:
            self._shapes = shapes
            self._captured = self._capture(images, labels)
        if self._captured is None or shapes != self._shapes:
            return self._step(images, labels)
        loss: Tensor = self._captured(images, labels)
        return loss

    def _capture(self, images: Tensor, labels: Tensor) -> CapturedStep | None:
        with warnings.catch_warnings():
            # torch's optimisers warn of the warm-up's uncaptured steps.
            warnings.filterwarnings("ignore", message=".*capturable=True.*", category=UserWarning)
            try:
                return capture_step(self._step, images, labels, restore=self._restore)
            except CaptureError as error:
                reason = str(error)
        warnings.warn(f"dwm_fast: training runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=4)
        return None


def _on_gpu(images: Tensor) -> bool:
    return images.device.type == "cuda"
