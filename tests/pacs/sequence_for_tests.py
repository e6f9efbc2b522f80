"""Two small learners, and sequences of domains short enough for a test."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch._dynamo  # torch's optimisers import it; once for all children
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast import methods as all_methods
from dwm_fast.errors import InputError
from dwm_fast.methods import INITS, TrainOptions
from dwm_fast.methods.sequence import Task
from dwm_fast.pacs import backbones
from dwm_fast.pacs.config import DOMAINS, StudyConfig, from_dict
from dwm_fast.pacs.sequence import SequenceStudy, figures
from dwm_fast.pacs.sequence import config as sequence_config_module

from .killing import serve
from .study_for_tests import CONFIG, NarrowNet, tiny_data

SEQUENCE = ("photo", "sketch", "art")
BASE = dataclasses.replace(CONFIG, sources=DOMAINS, targets=DOMAINS, inits=INITS)


class ToyLearner:
    """Fine-tunes one backbone, or with `frozen` only heads; in the view "masked" every domain has its own network."""

    def __init__(self, method: Toy, network: Callable[[int], nn.Module], head: str) -> None:
        self.method, self.make, self.head = method, network, head
        self.views = ("shared",) if method.frozen else ("shared", "masked")
        self.networks: dict[str, nn.Module] = {}

    def begin(self, task: Task, network: nn.Module) -> dict[str, Any]:
        self.networks[task.name] = copy.deepcopy(network)
        return {"steps": 0}

    def learn(self, task: Task) -> dict[str, Any]:
        model = copy.deepcopy(self._last())
        model.load_state_dict(
            {k: v for k, v in self.make(task.classes).state_dict().items() if k.startswith(self.head)}, strict=False
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.head) or not self.method.frozen)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], self.method.lr)
        model.train(not self.method.frozen)
        steps = 0
        for epoch in range(self.method.epochs):
            for images, labels in task.batches(epoch):
                loss = F.cross_entropy(model(images + 0.01 * torch.randn(())), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                task.progress({"loss": loss.detach()})
        self.networks[task.name] = model
        return {"steps": steps, "loss": task.loss(model), "drawn": task.seed % 1000}

    def _last(self) -> nn.Module:
        return self.networks[list(self.networks)[-1]]

    def network(self, name: str, view: str = "shared") -> nn.Module:
        if view == "masked":
            return self.networks[name].eval()
        model = copy.deepcopy(self._last())
        own = self.networks[name].state_dict()
        model.load_state_dict({k: v for k, v in own.items() if k.startswith(self.head)}, strict=False)
        return model.eval()

    def bits(self, name: str) -> int:
        return 0 if name == next(iter(self.networks)) else 100 * len(self.networks)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}/{k}": v
            for number, (name, model) in enumerate(self.networks.items())
            for k, v in model.state_dict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            task, _, name = key.partition("/")
            found.setdefault(task, {})[name] = value
        for task, values in sorted(found.items()):
            model = self.make(values[f"{self.head}.weight"].shape[0])
            model.load_state_dict(values)
            self.networks[task.partition(".")[2]] = model


@dataclass(frozen=True)
class Toy:
    """Options of `ToyLearner`."""

    epochs: int = 1
    lr: float = 0.1
    frozen: bool = False
    shares: tuple[float, ...] = (0.5,)
    training: TrainOptions = field(default_factory=TrainOptions)
    name: ClassVar[str] = "toy"

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise InputError(f"epochs is {self.epochs}; expected a whole number of at least 0")

    def learner(self, network: Callable[[int], nn.Module], head: str) -> ToyLearner:
        return ToyLearner(self, network, head)


@dataclass(frozen=True)
class Unhurried:
    """As `Toy` with frozen weights, but without a number of epochs."""

    name: ClassVar[str] = "unhurried"

    def learner(self, network: Callable[[int], nn.Module], head: str) -> ToyLearner:
        return ToyLearner(Toy(frozen=True), network, head)


def toys() -> dict[str, Any]:
    """A registry as `dwm_fast.methods.sequential_methods`; every default of a sequence is in it."""
    return {
        "none": Toy(),
        "piggyback": Toy(frozen=True),
        "ksm": Toy(frozen=True),
        "spg": Toy(lr=0.01),
        "packnet": Unhurried(),
        "binary": Toy(lr=0.05),
    }


def toy_presets() -> dict[str, Any]:
    """As `dwm_fast.methods.presets`."""
    return {"piggyback-paper": Toy(epochs=2, frozen=True)}


def offer_toys(monkeypatch: Any) -> None:
    """Make the toys the methods that there are."""
    monkeypatch.setattr("dwm_fast.methods.sequential_methods", toys)
    monkeypatch.setattr("dwm_fast.methods.presets", toy_presets)
    monkeypatch.setattr("dwm_fast.pacs.sequence.config.BUILTIN", {})


def sequence_config(**changes: Any) -> StudyConfig:
    """A sequence of three domains with two toys, in the setting of the other tests; needs `offer_toys`."""
    return from_dict({"sequence": SEQUENCE, "methods": ["none", "piggyback"], **changes}, BASE)


def draw_nothing(monkeypatch: Any) -> None:
    """Leave the figures out: they take longer than such a sequence."""
    monkeypatch.setattr("dwm_fast.pacs.sequence.figures.draw_all", lambda results: {})


def serve_sequence() -> None:
    """Run the sequence of `sequence_config` for a `killing.Runner`, without figures."""
    backbones.SmallResNet = NarrowNet
    all_methods.sequential_methods = toys
    all_methods.presets = toy_presets
    sequence_config_module.BUILTIN = {}
    figures.draw_all = lambda results: {}
    data = tiny_data()
    serve(lambda folder, report: SequenceStudy(sequence_config(), folder, data).run(report_step=lambda _: report()))


if __name__ == "__main__":
    serve_sequence()
