"""Single stages of a sequence of domains: one method learns one more domain, and all seen so far are evaluated.

As in `dwm_fast.pacs.lab` a stage is a pure function of the configuration and earlier results. Each starts from a fresh
learner that takes back the state which the stage before left in its file, also in a run that nothing interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwm_fast._options import recorded
from dwm_fast.methods.sequence import Learner, Task
from dwm_fast.pacs.backbones import last_linear
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data import PacsData
from dwm_fast.pacs.lab import Lab, Planned, stage_seed
from dwm_fast.pacs.stages import Finished

_LONGEST = 160
"""Characters of the domains in a stage's name; a file's name may have 255 bytes."""


class SequenceLab(Lab):
    """Does the stages of a configuration that has a sequence; arguments as `Lab`.

    Attributes:
        orders: all orders in which the configuration learns the domains.
        sequence: the domains in the order of this lab: the first of `orders`, unless `in_order` chose another.
    """

    def __init__(self, config: StudyConfig, data: PacsData, folder: Path, device: torch.device) -> None:
        super().__init__(config, data, folder, device)
        self.orders = config.in_orders()
        self.sequence = self.orders[0]

    def in_order(self, order: Sequence[str]) -> SequenceLab:
        """The same lab for one of its orders."""
        lab = copy.copy(self)
        lab.sequence = tuple(order)
        return lab

    def task_stage(self, method: str, position: int, seed: int) -> Planned:
        """As `Lab.source_stage`. The name holds the domains learned so far: sequences that begin alike share stages."""
        return self._stage(method, self.sequence[: position + 1], seed)

    def _stage(self, method: str, seen: Sequence[str], seed: int) -> Planned:
        options = recorded(self.config.sequential_method(method))
        return f"sequence-{method}-{_joined(seen)}-seed{seed}", {
            **self.source_stage(seen[0], seed)[1],
            method: options,
            "tasks": {domain: self._fingerprints[domain] for domain in seen[1:]},
        }

    def learned(self, method: str, position: int, seed: int) -> dict[str, Any]:
        """Figures of learning the domain at `position` after those before it; done, or read.

        The stage before keeps its figures alone from then on: its state is within this one's.
        """
        planned = self.task_stage(method, position, seed)
        figures = self.stages.figures(*planned)
        if figures is None:
            figures = self.stages.once(*planned, lambda: self._learn(method, position, seed))[1]
        self._thin_before(method, position, seed)  # a kill may have come in between
        return figures

    def learner(self, method: str, position: int, seed: int) -> Learner:
        """The learner as it was after the domain at `position`; a stage whose state is no longer kept is done again."""
        planned = self.task_stage(method, position, seed)
        state = self.stages.once(*planned, lambda: self._learn(method, position, seed), lambda kept: bool(kept[0]))[0]
        learner = self._fresh(method)
        learner.load_state(state)
        return learner

    def everything(self, methods: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows and tasks as of `whole`, of all methods, seeds and orders; of several orders each says its own."""
        rows: list[dict[str, Any]] = []
        tasks: list[dict[str, Any]] = []
        for seed, method, order in itertools.product(self.config.seeds, methods, self.orders):
            own = {"order": ",".join(order)} if len(self.orders) > 1 else {}
            found = self.in_order(order).whole(method, seed)
            rows += [{**own, **row} for row in found[0]]
            tasks += [{**own, **task} for task in found[1]]
        return rows, tasks

    def whole(self, method: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A method's whole sequence, done or read: rows, one for each accuracy, and tasks, one for each domain.

        A task has what learning the domain took, and the bits stored for it when the sequence has ended.
        """
        learned = [self.learned(method, position, seed) for position in range(len(self.sequence))]
        rows = [
            {**{key: one[key] for key in ("method", "seed", "position")}, **row}
            for one in learned
            for row in one["rows"]
        ]
        tasks = [
            {
                **{key: one[key] for key in ("method", "seed", "position", "domain")},
                "bits": learned[-1]["bits"][one["domain"]],
                "seconds": one["learning"]["seconds"],
                "figures": one["learning"]["figures"],
            }
            for one in learned
        ]
        return rows, tasks

    def _fresh(self, method: str) -> Learner:
        head = last_linear(self.network())
        return self.config.sequential_method(method).learner(lambda classes: self.network(classes=classes), head)

    def task(self, domain: str, seed: int, key: int) -> Task:
        """A domain as a task. Every method sees the same batches; `key` seeds what the method draws itself."""
        shared = stage_seed("task", domain, seed)
        return Task(name=domain, classes=self.classes(domain), **self.given(domain, shared), seed=key)

    def _learn(self, method: str, position: int, seed: int) -> Finished:
        name, settings = self.task_stage(method, position, seed)
        first, domain = self.sequence[0], self.sequence[position]
        start = self.network(self.source(first, seed).end, self.classes(first)) if position == 0 else None
        learner = self._fresh(method) if start is not None else self.learner(method, position - 1, seed)
        task = self.task(domain, seed, stage_seed(name))
        torch.manual_seed(stage_seed(name))
        begun = time.perf_counter()
        said = learner.learn(task) if start is None else learner.begin(task, start)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        learning = {"seconds": time.perf_counter() - begun, "figures": said}
        figures = {
            "method": method,
            "seed": seed,
            "position": position,
            "domain": domain,
            "learning": learning,
            "bits": {seen: learner.bits(seen) for seen in self.sequence[: position + 1]},
            "rows": self._evaluated(learner, position),
        }
        finished = self.stages.write(name, _own(learner.state()), figures, settings, begun)
        self._thin_before(method, position, seed)
        return finished

    def _thin_before(self, method: str, position: int, seed: int) -> None:
        """Leave the stage before its figures alone, once every order that goes on from it has done so."""
        seen = self.sequence[:position]
        following = {order[: position + 1] for order in self.orders if order[:position] == seen}
        if position and all(self.stages.check(*self._stage(method, order, seed)) for order in following):
            self.stages.thin(self._stage(method, seen, seed)[0])

    def _evaluated(self, learner: Learner, position: int) -> list[dict[str, Any]]:
        """Accuracy and loss on the test images of every domain seen, in every view."""
        rows = []
        for view in learner.views:
            for on in self.sequence[: position + 1]:
                accuracy, loss = self.evaluate(learner.network(on, view), on)
                rows.append(
                    {"view": view, "after": self.sequence[position], "on": on, "accuracy": accuracy, "loss": loss}
                )
        return rows


def says(figures: Mapping[str, Any]) -> str:
    """The accuracies of a stage in the method's first view, the domain just learned first."""
    view = figures["rows"][0]["view"]
    rows = [row for row in figures["rows"] if row["view"] == view][::-1]
    return ", ".join(f"{row['on']} {row['accuracy']:.3f}" for row in rows)


def _joined(seen: Sequence[str]) -> str:
    """The domains in the name of a file; of many, whose names no file system would take, a hash of them."""
    whole = "-".join(seen)
    if len(whole) <= _LONGEST:
        return whole
    return f"{len(seen)}-domains-{hashlib.sha256(','.join(seen).encode()).hexdigest()[:16]}"


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another: a safetensors file holds each by itself."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
