"""Single stages of a study, each done once and kept in the run folder, so that a killed study goes on where it was.

A stage is a pure function of the configuration and the results of earlier stages: its random numbers come from a
seed derived from its own name. So a stage that was cut off is simply done again, and gives the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast import ops
from dwm_fast.methods import (
    Binary,
    EditMask,
    FoundMask,
    Method,
    Naive,
    NoMask,
    SourceTask,
    TrainOptions,
    masked_view,
    reinitialise,
    source_view,
    train,
)
from dwm_fast.methods.base import Batch
from dwm_fast.nn import Edit, GumbelSigmoid, maskable_layers
from dwm_fast.pacs.augment import epoch_batches, normalise, random_resized_crop_flip
from dwm_fast.pacs.backbones import build_backbone, load_weights, weights_identity
from dwm_fast.pacs.config import StudyConfig
from dwm_fast.pacs.data import PacsData, fingerprint
from dwm_fast.pacs.stages import Finished, StageFolder

_SHARED_SETTINGS = ("backbone", "image_size", "train_size", "crop_scale", "batch_size", "amp")
_EVALUATION_BATCH = 128
_LOSS_IMAGES = 512

Report = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class Source:
    """A trained source network: state before and after training, and its figures."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Mask:
    """A found mask and its figures."""

    found: FoundMask
    figures: dict[str, Any]


def stage_seed(*key: object) -> int:
    """63-bit seed from a stage's name; equal on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little") >> 1


class Lab:
    """Does the stages of one configuration, reading from `folder` what is done already.

    Args:
        config: the study's configuration.
        data: the images, on the device they are trained on or on the CPU.
        folder: the run folder.
        device: where networks run.
    """

    def __init__(self, config: StudyConfig, data: PacsData, folder: Path, device: torch.device) -> None:
        self.config = config
        self.data = data
        self.stages = StageFolder(folder / "stages")
        self.device = device
        self.report: Report = lambda _: None
        self._fingerprints = {name: fingerprint({name: domain}) for name, domain in data.domains.items()}
        self._weights = weights_identity(config.weights)

    def network(self, state: Mapping[str, Tensor] | None = None, classes: int | None = None) -> nn.Module:
        """The backbone on the device in channels_last, with `state` where given; `classes` are the data's if None."""
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

    def sampled_loss(self, domain: str, key: int) -> Callable[[nn.Module], float]:
        """Network -> mean cross-entropy on a sample of a domain's training images, which `key` draws."""
        images = self.data.domains[domain]
        order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(key))
        sample = images.train[order[:_LOSS_IMAGES].to(images.train.device)]
        return lambda network: self.evaluate(network, domain, sample)[1]

    def source(self, source: str, seed: int) -> Source:
        """Train the source network, or read it."""
        name, settings = self.source_stage(source, seed)
        kept = self.stages.read(name, settings)
        if kept is None:
            kept = self._train_source(name, settings, source, seed)
        tensors, figures = kept
        split = {
            part: {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{part}/")}
            for part in ("start", "end")
        }
        return Source(split["start"], split["end"], figures)

    def _train_source(self, name: str, settings: dict[str, Any], source: str, seed: int) -> Finished:
        begun = time.perf_counter()
        torch.manual_seed(stage_seed("network", seed))
        model = build_backbone(self.config.backbone, len(self.data.classes))
        if self.config.weights is not None:
            load_weights(model, self.config.weights, self.config.backbone)
        start = {f"start/{k}": v.detach().clone() for k, v in model.state_dict().items()}
        model = self.network(model.state_dict())
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

    def source_stage(self, source: str, seed: int) -> tuple[str, dict[str, Any]]:
        """The stage's name, and what its result depends on: one made with other settings is not taken for this."""
        config = self.config
        return f"source-{source}-seed{seed}", {
            "source_data": self._fingerprints[source],
            "weights": self._weights,
            "training": dataclasses.asdict(config.source),
            **{name: getattr(config, name) for name in _SHARED_SETTINGS},
        }

    def method(self, name: str) -> Method:
        """A method by name, with the configuration's options."""
        config = self.config
        methods: dict[str, Method] = {
            "none": NoMask(),
            "naive": Naive(config.deviations, config.binary.include, config.binary.exclude),
            "edit": EditMask(Edit(config.edit_threshold, spread=config.edit_spread), config.edit),
            "binary": Binary(GumbelSigmoid(tau=config.tau, init=config.logit_init), config.binary),
        }
        return methods[name]

    def mask(self, source: str, method: str, seed: int) -> Mask:
        """Find a method's mask on a source, or read it."""
        name, settings = self.mask_stage(source, method, seed)
        kept = self.stages.read(name, settings)
        if kept is None:
            kept = self._find_mask(name, settings, source, method, seed)
        tensors, figures = kept
        keep = {
            layer: ops.unpack(tensors[layer], [numel])[0].view(shape)
            for layer, numel, shape in self._shapes()
            if layer in tensors
        }
        found = FoundMask(keep or None, figures["coefficient"], figures["within_budget"], figures["history"])
        return Mask(found, figures)

    def _shapes(self) -> list[tuple[str, int, torch.Size]]:
        layers = maskable_layers(build_backbone(self.config.backbone, len(self.data.classes)))
        return [(name, layer.weight.numel(), layer.weight.shape) for name, layer in layers.items()]

    def _find_mask(self, name: str, settings: dict[str, Any], source: str, method: str, seed: int) -> Finished:
        end = self.source(source, seed).end
        begun = time.perf_counter()
        key = stage_seed(name)
        torch.manual_seed(key)
        model = self.network(end)
        task = SourceTask(
            batches=self.batches(source, key),
            steps_per_epoch=self.steps(source),
            loss=self.sampled_loss(source, key),
            seed=key,
            progress=self.report,
            autocast=self.autocast,
        )
        found = self.method(method).find(model, task)
        figures: dict[str, Any] = {
            "source": source,
            "seed": seed,
            "method": method,
            "fraction_kept": found.fraction_kept,
            "coefficient": found.coefficient,
            "within_budget": found.within_budget,
            "history": found.history,
            "source_accuracy": self.evaluate(model, source)[0],
        }
        packed = {}
        if found.keep is not None:
            counts = found.counts()
            figures["kept"] = sum(kept for kept, _ in counts.values())
            figures["total"] = sum(total for _, total in counts.values())
            figures["layers"] = [{"name": n, "kept": k, "total": t} for n, (k, t) in counts.items()]
            figures["masked_accuracy"] = self.evaluate(masked_view(model, model, found.keep), source)[0]
            packed = {layer: ops.pack([mask]).cpu() for layer, mask in found.keep.items()}
        return self.stages.write(name, packed, figures, settings, begun)

    def mask_stage(self, source: str, method: str, seed: int) -> tuple[str, dict[str, Any]]:
        """As `source_stage`."""
        options = dataclasses.asdict(self.method(method))  # type: ignore[call-overload]
        return f"mask-{method}-{source}-seed{seed}", {**self.source_stage(source, seed)[1], method: options}

    def rows(self, source: str, target: str, method: str, init: str, seed: int) -> list[dict[str, Any]]:
        """Fine-tune on the target in each of the method's ways; one row a way and view (`shared`, `masked`)."""
        rows = []
        stages = self.tune_stages(source, target, method, init, seed)
        for options, (name, settings) in zip(self.config.tune[method], stages, strict=True):
            kept = self.stages.read(name, settings)
            if kept is None:
                kept = self._fine_tune(name, source, target, method, init, seed, options, settings)
            rows += kept[1]["rows"]
        return rows

    def tune_stages(
        self, source: str, target: str, method: str, init: str, seed: int
    ) -> list[tuple[str, dict[str, Any]]]:
        """As `source_stage`, for each of the method's ways."""
        shared = {
            **self.mask_stage(source, method, seed)[1],
            "target_data": self._fingerprints[target],
            "tune_size": self.tune_size,
            "tune_scale": self.config.tune_scale,
        }
        name = f"tune-{source}-{target}-{method}-{init}"
        return [
            (
                f"{name}-{options.batch_norm}-lr{options.lr:g}-seed{seed}",
                {**shared, "fine-tuning": dataclasses.asdict(options)},
            )
            for options in self.config.tune[method]
        ]

    def _fine_tune(
        self,
        name: str,
        source: str,
        target: str,
        method: str,
        init: str,
        seed: int,
        options: TrainOptions,
        settings: dict[str, Any],
    ) -> Finished:
        trained = self.source(source, seed)
        found = self.mask(source, method, seed) if method != "none" else None
        begun = time.perf_counter()
        torch.manual_seed(stage_seed(name))
        original, model = self.network(trained.end), self.network(trained.end)
        keep = None
        if found is not None and found.found.keep is not None:
            keep = {layer: mask.to(self.device) for layer, mask in found.found.keep.items()}
            start = {k: v.to(self.device) for k, v in trained.start.items()}
            reinitialise(model, keep, init, start, stage_seed(name))  # type: ignore[arg-type]
        train(
            model,
            self.batches(target, stage_seed("target", target, seed), tuning=True),
            self.steps(target),
            options,
            keep=keep,
            progress=self.report,
            autocast=self.autocast,
        )
        target_after = self.evaluate(model, target)[0]
        row = {
            "source": source,
            "target": target,
            "method": method,
            "init": init,
            "seed": seed,
            "bn_policy": options.batch_norm,
            "lr": options.lr,
            "source_before": trained.figures["accuracy"],
            "target_after": target_after,
            "fraction_kept": found.found.fraction_kept if found is not None else 0.0,
        }
        views = {"shared": source_view(model, original, options.batch_norm)}
        if keep is not None:
            views["masked"] = masked_view(model, original, keep)
        rows = [{**row, "view": v, "source_after": self.evaluate(net, source)[0]} for v, net in views.items()]
        seconds = time.perf_counter() - begun
        return self.stages.write(name, {}, {"rows": [{**r, "seconds": seconds} for r in rows]}, settings, begun)
