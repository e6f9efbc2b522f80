"""What every study does stage by stage: batches, training a source network, evaluation; each stage kept in the folder.

A stage is a pure function of the configuration and the results of earlier stages: its random numbers come from a
seed derived from its own name. So a stage that was cut off is simply done again, and gives the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._options import recorded
from dwm_fast.methods import train
from dwm_fast.methods.base import Batch
from dwm_fast.pacs.backbones import build_backbone, load_weights, weights_identity
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data import PacsData, fingerprint
from dwm_fast.pacs.data.augment import epoch_batches, normalise, random_resized_crop_flip
from dwm_fast.pacs.stages import Finished, StageFolder, check_finite

_SHARED_SETTINGS = ("backbone", "image_size", "train_size", "crop_scale", "batch_size", "amp")
_EVALUATION_BATCH = 128
_LOSS_IMAGES = 512

Report = Callable[[Mapping[str, Tensor]], None]
Planned = tuple[str, dict[str, Any]]
"""A stage's name, and what its result depends on: one made with other settings is not taken for it."""


@dataclass(frozen=True)
class Source:
    """A trained source network: state before and after training, and its figures."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    figures: dict[str, Any]


def stage_seed(*key: object) -> int:
    """63-bit seed from a stage's name; equal on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little") >> 1


class Lab:
    """Does the stages that the wings share, reading from `folder` what is done already.

    Args:
        config: the study's configuration.
        data: the images, on the device they are trained on or on the CPU.
        folder: the run folder.
        device: where networks run.
    """

    def __init__(self, config: StudyConfig, data: PacsData, folder: Path, device: torch.device) -> None:
        self.config = config
        self.data = data
        self.stages = StageFolder(folder / "stages", device)
        self.device = device
        self.report: Report = lambda _: None
        self._fingerprints = {name: fingerprint({name: domain}) for name, domain in data.domains.items()}
        self._weights = weights_identity(config.weights)

    def classes(self, domain: str) -> int:
        """Number of classes of a domain."""
        return len(self.data.classes_of(domain))

    def network(self, state: Mapping[str, Tensor] | None = None, classes: int | None = None) -> nn.Module:
        """The backbone on the device in channels_last, with `state` where given; None: as many classes as the data."""
        model = build_backbone(self.config.backbone, len(self.data.classes) if classes is None else classes)
        if state is not None:
            model.load_state_dict(dict(state))
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def autocast(self) -> Any:
        """Autocast for the forward pass as the configuration says."""
        on = self.config.amp == "bf16" or (self.config.amp == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    def batches(self, domain: str, key: int, tuning: bool = False) -> Callable[[int], Iterator[Batch]]:
        """Epoch number -> augmented training batches of a domain; `key` seeds order and augmentation."""
        images = self.data.domains[domain]
        config = self.config
        size, scale = (self.tune_size, config.tune_scale) if tuning else (config.train_size, config.crop_scale)

        def epoch(number: int) -> Iterator[Batch]:
            generator = torch.Generator(images.images.device).manual_seed(stage_seed(key, number))
            for index in epoch_batches(images.train, self.config.batch_size, generator, drop_last=True):
                crops = random_resized_crop_flip(images.images[index], size, generator, scale=(scale, 1.0))
                yield crops.to(self.device), images.labels[index].to(self.device)

        return epoch

    @property
    def tune_size(self) -> int:
        """Side of the crops fine-tuned on."""
        return self.config.tune_size or self.config.image_size

    def steps(self, domain: str) -> int:
        """Training steps an epoch."""
        return max(1, len(self.data.domains[domain].train) // self.config.batch_size)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, domain: str, positions: Tensor | None = None) -> tuple[float, float]:
        """Accuracy and mean cross-entropy on a domain's test images (or those at `positions`), in eval mode."""
        model.eval()
        images = self.data.domains[domain]
        chosen = images.test if positions is None else positions
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in torch.split(chosen, _EVALUATION_BATCH):
            labels = images.labels[index].to(self.device)
            with self.autocast():
                output = model(normalise(images.images[index]).to(self.device))
            right += (output.argmax(1) == labels).sum()
            loss += F.cross_entropy(output.float(), labels, reduction="sum")
        return int(right) / len(chosen), float(loss) / len(chosen)

    def accuracy(self, stage: str, model: nn.Module, domain: str) -> float:
        """Accuracy on a domain's test images, for a stage; InputError where the loss there is not finite."""
        accuracy, loss = self.evaluate(model, domain)
        check_finite(stage, {f"the loss on {domain}": loss}, {})
        return accuracy

    def sampled_loss(self, domain: str, key: int) -> Callable[[nn.Module], float]:
        """Network -> mean cross-entropy on a sample of a domain's training images, which `key` draws."""
        images = self.data.domains[domain]
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(key))
        sample = images.train[order[:_LOSS_IMAGES].to(images.train.device)]
        return lambda network: self.evaluate(network, domain, sample)[1]

    def given(self, domain: str, key: int) -> dict[str, Any]:
        """What a method gets of a domain, beside its own seed: batches and losses that `key` draws."""
        return {
            "batches": self.batches(domain, key),
            "steps_per_epoch": self.steps(domain),
            "loss": self.sampled_loss(domain, key),
            "progress": self.report,
            "autocast": self.autocast,
        }

    def source(self, source: str, seed: int) -> Source:
        """Train the source network, or read it."""
        name, settings = self.source_stage(source, seed)
        tensors, figures = self.stages.once(name, settings, lambda: self._train_source(name, settings, source, seed))
        split = {
            part: {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{part}/")}
            for part in ("start", "end")
        }
        return Source(split["start"], split["end"], figures)

    def _train_source(self, name: str, settings: dict[str, Any], source: str, seed: int) -> Finished:
        begun = time.perf_counter()
        torch.manual_seed(stage_seed("network", seed))
        model = build_backbone(self.config.backbone, self.classes(source))
        if self.config.weights is not None:
            load_weights(model, self.config.weights, self.config.backbone)
        start = {f"start/{k}": v.detach().clone() for k, v in model.state_dict().items()}
        model = self.network(model.state_dict(), self.classes(source))
        train(
            model,
            self.batches(source, stage_seed(name)),
            self.steps(source),
            self.config.source,
            progress=self.report,
            autocast=self.autocast,
        )
        accuracy, loss = self.evaluate(model, source)
        figures = {"source": source, "seed": seed, "accuracy": accuracy, "loss": loss}
        end = {f"end/{k}": v.detach().cpu() for k, v in model.state_dict().items()}
        return self.stages.write(name, {**start, **end}, figures, settings, begun)

    def source_stage(self, source: str, seed: int) -> Planned:
        """The stage of a source network, before it is done."""
        config = self.config
        return f"source-{source}-seed{seed}", {
            "source_data": self._fingerprints[source],
            "weights": self._weights,
            "training": recorded(config.source),
            **{name: getattr(config, name) for name in _SHARED_SETTINGS},
        }
