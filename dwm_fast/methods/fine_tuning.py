"""none, domain after domain: plain fine-tuning of the whole network, a head for each domain; the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from dwm_fast.methods.learner import SequenceLearner, norm_names, seeded, train_task
from dwm_fast.methods.sequence import Task
from dwm_fast.methods.transfer import TrainOptions, check_frozen


@dataclass(frozen=True)
class FineTuning:
    """Fine-tune everything on the next task; earlier tasks are seen through the network as it is then.

    Args:
        options: how. Its batch_norm: "per-domain" (ours) keeps statistics and affine parameters of each task, "shared"
            evaluates every task with the newest, "frozen" leaves the first task's.
    """

    options: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=3, lr=3e-4, batch_norm="per-domain"))
    name: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_frozen(self.options)

    def learner(self, network: Callable[[int], nn.Module], head: str) -> FineTuner:
        """A learner that has seen nothing."""
        return FineTuner(network, head, self.options)


class FineTuner(SequenceLearner):
    """`FineTuning` over a sequence. A task has its head and, by policy, its batch norm; all else is shared."""

    def __init__(self, network: Callable[[int], nn.Module], head: str, options: TrainOptions) -> None:
        super().__init__(network, head)
        self._options = options

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        """Take the network as it is."""
        self.start(task, network)
        if self._options.batch_norm == "per-domain":
            self.own[task.name] |= {k: v for k, v in self.shared.items() if norm_names(network)(k)}
        return {}

    def learn(self, task: Task) -> dict[str, Any]:
        """Fine-tune every weight."""
        with seeded(task):
            network = self.fresh(task)
            train_task(network, task, self._options)
        own = norm_names(network) if self._options.batch_norm == "per-domain" else lambda _: False
        self.add_task(task, network, own)
        self.set_shared(network)
        return {}
