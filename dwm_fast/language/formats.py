"""What fewer bits cost: masks of the small Llama learned with each format of logits and moments, over several seeds."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._files import write_atomic
from dwm_fast._options import FRACTION, RATE, above, check_options, whole
from dwm_fast.language.study import EXCLUDED, LanguageStudy, cross_entropy, machine, pruned, train_network
from dwm_fast.language.text import SOURCE, Text
from dwm_fast.methods import SourceTask, Wanda
from dwm_fast.methods.pruning import start_from
from dwm_fast.nn import GumbelSigmoid, mask_model
from dwm_fast.ops.coding import decoded
from dwm_fast.optim import StreamedAdam

FORMATS = (("fp32", "fp32"), ("fp32", "8bit"), ("fixed16", "8bit"), ("bf16", "8bit"))
"""Logits and moments that are compared, the first with all others."""
NOISE = "fp32, other noise"
"""A second run of the first format, whose masks are drawn by another seed: how much chance alone changes."""


@dataclass(frozen=True)
class FormatStudy:
    """Sizes of the comparison.

    Args:
        language: network, text, and steps of the masks. Its seed is the first of `seeds`.
        seeds: networks, each trained and masked by a seed of its own.
        lr: Adam's rate on the logits, to 0 by a cosine.
        density: fraction of the masked weights to keep.
        density_weight: the loss is cross-entropy + density_weight abs(D - density), D the mean of sigmoid(logits).
    """

    language: LanguageStudy = field(default_factory=LanguageStudy)
    seeds: Annotated[int, whole(1)] = 3
    lr: Annotated[float, RATE] = 0.3
    density: Annotated[float, FRACTION] = 0.5
    density_weight: Annotated[float, above(0, "a weight")] = 7.0

    def __post_init__(self) -> None:
        check_options(self)


def learn(
    network: nn.Module, study: FormatStudy, text: Text, logits: str, moments: str, noise: int
) -> dict[str, Tensor]:
    """Keep masks of the wanted density, from Wanda's mask on; every format sees the same batches and start values."""
    language = study.language
    task = SourceTask(
        batches=lambda epoch: text.batches(1000 + epoch, 50, language.rows, language.length),
        steps_per_epoch=50,
        loss=lambda net: math.nan,
        seed=language.seed,
    )
    prior = Wanda(study.density, exclude=EXCLUDED).find(network, task).keep or {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(language.seed)
        kind = GumbelSigmoid(init=0.0, spread=0.5)
        masked = mask_model(network, kind, exclude=EXCLUDED, memory="streamed", logits=logits, seed=noise)
    start_from(masked, prior, 6.0)
    optimizer = StreamedAdam(masked, study.lr, betas=(0.9, 0.95), moments=moments)  # type: ignore[arg-type]
    masked.train()
    steps = language.mask_steps
    for step, (inputs, labels) in enumerate(text.batches(2000, steps, language.rows, language.length)):
        many = float(masked.sparsity_penalty().detach()) > study.density
        for group in optimizer.param_groups:
            group["lr"] = study.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["coefficient"] = study.density_weight if many else -study.density_weight
        F.cross_entropy(masked(inputs).flatten(0, 1), labels.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _largest({name: decoded(layer.mask_logits.detach()) for name, layer in masked.mask_layers().items()}, study)


def _largest(logits: Mapping[str, Tensor], study: FormatStudy) -> dict[str, Tensor]:
    """The wanted fraction of all weights, those of the largest logits; equal logits fall together."""
    every = torch.cat([x.flatten() for x in logits.values()])
    border = every.kthvalue(max(1, round((1 - study.density) * every.numel()))).values
    return {name: x > border for name, x in logits.items()}


def compare(study: FormatStudy, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Learn and measure; writes formats.json and formats.md into `folder` and returns the results."""
    text, begun, rows = Text(), time.perf_counter(), []
    held_out = text.held_out(study.language.pieces, study.language.length)
    for seed in range(study.language.seed, study.language.seed + study.seeds):
        one = replace(study, language=replace(study.language, seed=seed))
        network = train_network(one.language, text)
        row: dict[str, Any] = {"seed": seed, "dense": math.exp(cross_entropy(network, *held_out)), "density": {}}
        for logits, moments in (*FORMATS, FORMATS[0]):
            name = NOISE if f"{logits}, {moments}" in row else f"{logits}, {moments}"
            keep = learn(network, one, text, logits, moments, seed + (1000 if name == NOISE else 0))
            kept, total = (sum(int(count(m)) for m in keep.values()) for count in (torch.sum, torch.numel))
            row[name], row["density"][name] = math.exp(cross_entropy(pruned(network, keep), *held_out)), kept / total
            say(f"seed {seed}, {name}: perplexity {row[name]:.4f}, density {kept / total:.4f}")
        rows.append(row)
    results = {"text": SOURCE, "study": asdict(study), "machine": machine(), "rows": rows,
               "seconds": round(time.perf_counter() - begun, 1)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "formats.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomic(folder / "formats.md", table(rows).encode())
    return results


def differences(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Perplexity of one format minus that of fp32 under the same noise, a seed at a time."""
    return [row[name] - row[", ".join(FORMATS[0])] for row in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a format, perplexity of each seed, and how far it lies from fp32's in the mean."""
    seeds = " | ".join(f"seed {row['seed']}" for row in rows)
    lines = [f"| logits, moments | {seeds} | mean difference to fp32 |", "|---" * (len(rows) + 2) + "|"]
    for name in (*map(", ".join, FORMATS), NOISE):
        values = " | ".join(f"{row[name]:.3f}" for row in rows)
        mean = statistics.fmean(differences(rows, name))
        lines.append(f"| {name} | {values} | {'-' if name == 'fp32, fp32' else f'{mean:+.3f}'} |")
    return "\n".join(lines) + "\n"
