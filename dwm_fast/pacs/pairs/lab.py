"""Single stages of the study of pairs: finding a mask on a source, fine-tuning on a target with it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwm_fast import ops
from dwm_fast._options import recorded
from dwm_fast.errors import InputError
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
from dwm_fast.nn import Edit, GumbelSigmoid, maskable_weights
from dwm_fast.pacs.backbones import build_backbone, last_linear
from dwm_fast.pacs.lab import Lab, Planned, stage_seed
from dwm_fast.pacs.stages import Finished


@dataclass(frozen=True)
class Run:
    """One cell of the grid: fine-tuning of a source network on a target, its mask found by a method."""

    source: str
    target: str
    method: str
    init: str
    seed: int

    @property
    def name(self) -> str:
        """How the names of its stages begin."""
        return f"tune-{self.source}-{self.target}-{self.method}-{self.init}"


@dataclass(frozen=True)
class Mask:
    """A found mask and its figures."""

    found: FoundMask
    figures: dict[str, Any]


class PairLab(Lab):
    """Does the stages of a configuration without a sequence; arguments as `Lab`."""

    def method(self, name: str) -> Method:
        """A method by name, with the configuration's options."""
        config = self.config
        methods: dict[str, Method] = {
            "none": NoMask(),
            "naive": Naive(config.deviations, config.binary.include, config.binary.exclude),
            "edit": EditMask(Edit(config.edit_threshold, spread=config.edit_spread), config.edit),
            "binary": Binary(GumbelSigmoid(tau=config.tau, init=config.logit_init), config.binary),
        }
        return methods[name] if name in methods else config.pair_method(name)

    def seen(self, method: str, target: str) -> str | None:
        """The target, where the method sees its images; None where one mask of a source serves all targets."""
        return target if getattr(self.method(method), "sees_target", False) else None

    def mask(self, source: str, method: str, seed: int, target: str | None = None) -> Mask:
        """Find a method's mask on a source, or read it; `target` as `seen` gives it."""
        planned = self.mask_stage(source, method, seed, target)
        tensors, figures = self.stages.once(*planned, lambda: self._find_mask(planned, source, method, seed, target))
        keep = {
            layer: ops.unpack(tensors[layer], [numel])[0].view(shape)
            for layer, numel, shape in self._shapes(source)
            if layer in tensors
        }
        found = FoundMask(keep or None, figures["coefficient"], figures["within_budget"], figures["history"])
        return Mask(found, figures)

    def _shapes(self, source: str) -> list[tuple[str, int, torch.Size]]:
        """Name, elements and shape of every tensor that may have a mask: weights, and the biases beside them."""
        weights = maskable_weights(build_backbone(self.config.backbone, self.classes(source)))
        biases = {f"{there.path}.bias": getattr(there.module, "bias", None) for there in weights.values()}
        found = {name: there.weight for name, there in weights.items()}
        found |= {name: bias for name, bias in biases.items() if isinstance(bias, nn.Parameter)}
        return [(name, tensor.numel(), tensor.shape) for name, tensor in found.items()]

    def _find_mask(self, planned: Planned, source: str, method: str, seed: int, target: str | None) -> Finished:
        name, settings = planned
        trained = self.source(source, seed)
        begun = time.perf_counter()
        key = stage_seed(name)
        torch.manual_seed(key)
        model = self.network(trained.end, self.classes(source))
        other = None if target is None else SourceTask(**self.given(target, key), seed=key)
        found = self.method(method).find(
            model, SourceTask(**self.given(source, key), seed=key, start=trained.start, target=other)
        )
        if method != "none" and not found.keep:
            raise InputError(f"method '{method}' found no mask on {source}; expected a keep mask for a layer or more")
        figures: dict[str, Any] = {
            "source": source,
            **({} if target is None else {"target": target}),
            "seed": seed,
            "method": method,
            "fraction_kept": found.fraction_kept,
            "coefficient": found.coefficient,
            "within_budget": found.within_budget,
            "history": found.history,
            "source_accuracy": self.accuracy(name, model, source),
        }
        packed = {}
        if found.keep is not None:
            counts = found.counts()
            figures["kept"] = sum(kept for kept, _ in counts.values())
            figures["total"] = sum(total for _, total in counts.values())
            figures["layers"] = [{"name": n, "kept": k, "total": t} for n, (k, t) in counts.items()]
            figures["masked_accuracy"] = self.accuracy(name, masked_view(model, model, found.keep), source)
            packed = {layer: ops.pack([mask]).cpu() for layer, mask in found.keep.items()}
        return self.stages.write(name, packed, figures, settings, begun)

    def mask_stage(self, source: str, method: str, seed: int, target: str | None = None) -> Planned:
        """As `source_stage`."""
        own = {method: recorded(self.method(method))}
        seen = {} if target is None else {"mask_target_data": self._fingerprints[target]}
        domains = source if target is None else f"{source}-{target}"
        return f"mask-{method}-{domains}-seed{seed}", {**self.source_stage(source, seed)[1], **own, **seen}

    def rows(self, run: Run) -> list[dict[str, Any]]:
        """Fine-tune on the target in each of the method's ways; one row a way and view (`shared`, `masked`)."""
        rows = []
        for options, planned in zip(self.config.ways(run.method), self.tune_stages(run), strict=True):
            tune = functools.partial(self._fine_tune, *planned, run, options)
            rows += self.stages.once(*planned, tune)[1]["rows"]
        return rows

    def tune_stages(self, run: Run) -> list[Planned]:
        """As `source_stage`, for each of the method's ways."""
        shared = {
            **self.mask_stage(run.source, run.method, run.seed, self.seen(run.method, run.target))[1],
            "target_data": self._fingerprints[run.target],
            "tune_size": self.tune_size,
            "tune_scale": self.config.tune_scale,
        }
        return [
            (
                f"{run.name}-{_way(options)}-seed{run.seed}",
                {**shared, "fine-tuning": recorded(options)},
            )
            for options in self.config.ways(run.method)
        ]

    def classes_differ(self, source: str, target: str) -> bool:
        """Whether the source's head has to be replaced for the target."""
        return self.data.classes_of(source) != self.data.classes_of(target)

    def _with_fresh_head(self, original: nn.Module, head: str, run: Run) -> nn.Module:
        """The source network with a new head for the target's classes, one for all methods."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stage_seed("head", run.source, run.target, run.seed))
            fresh = build_backbone(self.config.backbone, self.classes(run.target)).state_dict()
        own = {key: value for key, value in fresh.items() if key.startswith(f"{head}.")}
        return self.network({**original.state_dict(), **own}, self.classes(run.target))

    def _fine_tune(self, name: str, settings: dict[str, Any], run: Run, options: TrainOptions) -> Finished:
        trained = self.source(run.source, run.seed)
        seen = self.seen(run.method, run.target)
        found = self.mask(run.source, run.method, run.seed, seen).found if run.method != "none" else None
        begun = time.perf_counter()
        torch.manual_seed(stage_seed(name))
        original = self.network(trained.end, self.classes(run.source))
        head = last_linear(original) if self.classes_differ(run.source, run.target) else None
        model = copy.deepcopy(original) if head is None else self._with_fresh_head(original, head, run)
        keep = whole = None
        if found is not None and found.keep is not None:
            whole = {layer: mask.to(self.device) for layer, mask in found.keep.items()}
            keep = {name: mask for name, mask in whole.items() if head is None or not f"{name}.".startswith(f"{head}.")}
            start = {k: v.to(self.device) for k, v in trained.start.items()}
            reinitialise(model, keep, run.init, start, stage_seed(name))  # type: ignore[arg-type]
        train(
            model,
            self.batches(run.target, stage_seed("target", run.target, run.seed), tuning=True),
            self.steps(run.target),
            options,
            keep=keep,
            progress=self.report,
            autocast=self.autocast,
        )
        row = {
            **dataclasses.asdict(run),
            "bn_policy": options.batch_norm,
            "lr": options.lr,
            **({} if options.kept_decay is None else {"kept_decay": options.kept_decay}),
            "source_before": trained.figures["accuracy"],
            "target_after": self.accuracy(name, model, run.target),
            "fraction_kept": found.fraction_kept if found is not None else 0.0,
        }
        of_source = model if head is None else _with_head_of(model, original, head)
        views = {"shared": source_view(of_source, original, options.batch_norm)}
        if whole is not None:
            views["masked"] = masked_view(of_source, original, whole)
        rows = [{**row, "view": v, "source_after": self.accuracy(name, net, run.source)} for v, net in views.items()]
        seconds = time.perf_counter() - begun
        return self.stages.write(name, {}, {"rows": [{**r, "seconds": seconds} for r in rows]}, settings, begun)


def _way(options: TrainOptions) -> str:
    """What tells the ways of a method apart, as stages are named."""
    pull = "" if options.kept_decay is None else f"-pull{options.kept_decay:g}"
    return f"{options.batch_norm}-lr{options.lr:g}{pull}"


def _with_head_of(tuned: nn.Module, source: nn.Module, head: str) -> nn.Module:
    """The fine-tuned network with the source's own head in place of the target's."""
    network = copy.deepcopy(source)
    state = {key: value for key, value in tuned.state_dict().items() if not key.startswith(f"{head}.")}
    network.load_state_dict(state, strict=False)
    return network.eval()
