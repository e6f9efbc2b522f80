"""Lottery tickets (Frankle and Carbin 2019): prune the smallest weights round by round, rewind the others."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from dwm_fast._options import FRACTION, check_options, whole
from dwm_fast.errors import InputError
from dwm_fast.methods.base import FoundMask, SourceTask
from dwm_fast.methods.transfer import TrainOptions, check_frozen, train
from dwm_fast.nn import maskable_weights


def survivors(weight: Tensor, kept: Tensor, fraction: float) -> Tensor:
    """`kept` without the round(fraction n) smallest, by abs(w), of the n weights that it keeps."""
    left = weight.detach().abs().masked_fill(~kept, torch.inf).flatten()
    smallest = left.topk(round(fraction * int(kept.sum())), largest=False).indices
    return kept.flatten().index_fill(0, smallest, False).view(kept.shape)


@dataclass(frozen=True)
class LotteryTicket:
    """Iterative magnitude pruning: what is left after all rounds is what the source needs.

    The first round prunes the source network as it is; each later one trains the survivors on the source, from their
    values before source training, with the others 0.

    Args:
        rounds: how often it is pruned; 0.8^rounds of the weights are left (ours: 5, a third).
        prune: fraction of what is left in a layer that a round prunes (paper: 0.2).
        options: how a round trains; ours.
    """

    rounds: Annotated[int, whole(1)] = 5
    prune: Annotated[float, FRACTION] = 0.2
    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=2, lr=1e-3))
    name: ClassVar[str] = "lottery-ticket"

    def __post_init__(self) -> None:
        check_options(self)
        check_frozen(self.options)

    def find(self, model: nn.Module, task: SourceTask) -> FoundMask:
        """The survivors; the loss after each round's training is in the history."""
        if task.start is None:
            raise InputError("lottery-ticket rewinds weights to their start; give SourceTask(start=state_dict)")
        network = copy.deepcopy(model)
        keep = {name: torch.ones_like(w.weight, dtype=torch.bool) for name, w in maskable_weights(network).items()}
        history = []
        for number in range(self.rounds):
            if number:
                self._train(network, keep, task, number)
            history.append({"loss": task.loss(network), "fraction_kept": FoundMask(keep).fraction_kept})
            weights = {name: there.weight for name, there in maskable_weights(network).items()}
            keep = {name: survivors(weights[name], mask, self.prune) for name, mask in keep.items()}
        return FoundMask(keep, history=history)

    def _train(self, network: nn.Module, keep: dict[str, Tensor], task: SourceTask, number: int) -> None:
        """Rewind, set to 0 what is pruned, and train the rest; a weight that is 0 and not trained stays 0."""
        assert task.start is not None
        network.load_state_dict(dict(task.start))
        with torch.no_grad():
            for name, there in maskable_weights(network).items():
                there.weight[~keep[name]] = 0.0
        train(
            network,
            lambda epoch: task.batches(epoch + number * self.options.epochs),
            task.steps_per_epoch,
            self.options,
            keep={name: ~mask for name, mask in keep.items()},
            progress=task.progress,
            autocast=task.autocast,
        )
