"""Low-rank reuse: the top singular directions of every weight are kept, what is orthogonal to them may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast._options import FRACTION, check_options
from dwm_fast.errors import InputError
from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.learner import SequenceLearner, Tensors, norm_names, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen
from dwm_fast.nn import maskable_weights

Directions = tuple[Tensor, Tensor]
"""Orthonormal columns over outputs (out, r) and over inputs (in, r)."""


def free_part(matrix: Tensor, kept: Directions) -> Tensor:
    """(I - U U^T) W (I - V V^T), the part of a matrix (out, in) that neither uses kept outputs nor kept inputs."""
    left, right = kept
    rest = matrix - left @ (left.T @ matrix)
    return rest - (rest @ right) @ right.T


def top_directions(matrix: Tensor, energy: float, kept: Directions | None = None) -> Directions:
    """Kept directions, and the fewest more that leave the free part no more than (1 - energy) |W|^2.

    Those added are the top singular directions of the free part; without `kept`, those of W itself.

    Args:
        matrix: W (out, in).
        energy: fraction of |W|^2, between 0 and 1.
        kept: of earlier tasks.
    """
    left, right = kept or (matrix.new_zeros(len(matrix), 0), matrix.new_zeros(matrix.shape[1], 0))
    u, s, vh = torch.linalg.svd(free_part(matrix, (left, right)), full_matrices=False)
    squares = s.double().square()
    most = (1.0 - energy) * float(matrix.double().square().sum())
    left_over = squares.sum() - squares.cumsum(0)  # after taking 1, 2, ... directions
    rank = 0 if float(squares.sum()) <= most else 1 + int((left_over > most).sum())
    rank = min(rank, len(s), min(matrix.shape) - left.shape[1])
    return torch.cat([left, u[:, :rank]], 1), torch.cat([right, vh[:rank].T], 1)


def carried(weight: Tensor, energy: float) -> Tensor:
    """Bool of the weight's shape: where abs(L) >= abs(W - L), L being W's part in its top singular directions."""
    matrix = weight.detach().flatten(1).float()
    left, _ = top_directions(matrix, energy)
    low = left @ (left.T @ matrix)
    return (low.abs() >= (matrix - low).abs()).view(weight.shape)


@dataclass(frozen=True)
class LowRank:
    """Keep what a weight does in its top singular directions, and let the rest be reused (all of it ours).

    The DWM paper names a linear-algebraic view as future work and gives no rule. Pairs: keep a weight where its part in
    the top directions is at least as large as the rest. Sequences: later tasks move W only orthogonally to them.

    Args:
        energy: what part of |W|^2 the kept directions hold.
        options: of a sequence: how later tasks train. batch_norm is "frozen" or "per-domain".
    """

    energy: Annotated[float, FRACTION] = 0.5
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=1e-3, batch_norm="per-domain"))
    name: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        check_options(self)
        check_frozen(self.options)
        if self.options.batch_norm == "shared":
            raise InputError("options.batch_norm is 'shared'; expected frozen or per-domain: earlier tasks need theirs")

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """Keep the weights that the top singular directions of their layer carry; looks at no image."""
        return FoundMask({name: carried(there.weight, self.energy) for name, there in maskable_weights(model).items()})

    def learner(self, network: Callable[[int], nn.Module], head: str) -> LowRankLearner:
        """A learner that has seen nothing."""
        return LowRankLearner(network, head, self)


class LowRankLearner(SequenceLearner):
    """`LowRank` over a sequence: one network, in which W V and U^T W of kept directions stay as they are."""

    MEMORY = ("left", "right")
    method: LowRank

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as it is, and keep its top directions."""
        self.start(task, network)
        own = self._own(network)
        self.own[task.name] |= {key: tensor for key, tensor in self.shared.items() if own(key)}
        return self._keep(network)

    def learn(self, task: Task) -> dict[str, Any]:
        """Train what is orthogonal to all kept directions and the head; then keep more directions."""
        options = self.method.options
        with seeded(task):
            network = self.fresh(task)
            layers = {layer: there.weight for layer, there in self.maskable(network).items()}
            start = {layer: weight.detach().clone() for layer, weight in layers.items()}

            def after_step(figures: Mapping[str, Tensor]) -> None:
                self._project(layers, start)
                task.progress(figures)

            norms, weights = norm_names(network), {f"{layer}.weight" for layer in layers}
            others = {name for name, _ in network.named_parameters() if not norms(name) and not self.of_head(name)}
            told = dataclasses.replace(task, progress=after_step)
            train_task(network, told, options, fixed=others - weights)
        self.add_task(task, network, self._own(network))
        self.set_shared(network)
        return self._keep(network)

    @torch.no_grad()
    def _project(self, layers: Mapping[str, Tensor], start: Tensors) -> None:
        """Take back from every weight what moved it within the kept directions."""
        for layer, weight in layers.items():
            moved = (weight - start[layer]).flatten(1).float()
            allowed = free_part(moved, (self.memory["left"][layer], self.memory["right"][layer]))
            weight.copy_(start[layer] + allowed.view_as(weight))

    @torch.no_grad()
    def _keep(self, network: nn.Module) -> dict[str, Any]:
        """Add directions until they hold the energy of every weight as it is now."""
        total, free = 0, 0
        left, right = self.memory["left"], self.memory["right"]
        for layer, there in self.maskable(network).items():
            matrix = there.weight.detach().flatten(1).float()
            kept = (left[layer], right[layer]) if layer in left else None
            left[layer], right[layer] = top_directions(matrix, self.method.energy, kept)
            rank = left[layer].shape[1]
            total += matrix.numel()
            free += (matrix.shape[0] - rank) * (matrix.shape[1] - rank)
        return {"fraction_frozen": 1.0 - free / total}

    def _own(self, network: nn.Module) -> Callable[[str], bool]:
        return norm_names(network) if self.method.options.batch_norm == "per-domain" else lambda _: False
