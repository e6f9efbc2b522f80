"""The study: a small Llama, pruned to half its weights and to 2:4 by four methods, and what perplexity is left."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwm_fast._files import write_atomic
from dwm_fast._options import RATE, check_options, whole
from dwm_fast.language.network import SmallLlama
from dwm_fast.language.text import SOURCE, Text
from dwm_fast.methods import LEAP, Magnitude, MaskLLM, MaskTraining, SourceTask, Wanda
from dwm_fast.methods.base import FoundMask

EXCLUDED = ("head",)
_SLICE = 32


@dataclass(frozen=True)
class LanguageStudy:
    """Sizes of the study.

    Args:
        width, layers, heads, hidden: of the network.
        length, rows: letters of a piece, pieces of a batch.
        steps, lr: of the network's training (AdamW, cosine).
        mask_steps, mask_lr: of LEAP's and MaskLLM's.
        pieces: of the held-out text that perplexity is measured on.
        seed: of everything.
    """

    width: Annotated[int, whole(8)] = 96
    layers: Annotated[int, whole(1)] = 3
    heads: Annotated[int, whole(1)] = 4
    hidden: Annotated[int, whole(8)] = 256
    length: Annotated[int, whole(2)] = 96
    rows: Annotated[int, whole(1)] = 16
    steps: Annotated[int, whole(1)] = 400
    lr: Annotated[float, RATE] = 3e-3
    mask_steps: Annotated[int, whole(1)] = 200
    mask_lr: Annotated[float, RATE] = 3e-3
    pieces: Annotated[int, whole(1)] = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)

    def methods(self) -> dict[tuple[str, str], Any]:
        """(sparsity, method) -> method; LEAP's and MaskLLM's rules at this study's steps and rate."""
        mask = {"steps": self.mask_steps, "lr": self.mask_lr, "exclude": EXCLUDED}
        training = MaskTraining(**mask)  # type: ignore[arg-type]
        clipped = MaskTraining(**mask, clip_norm=1.0)  # type: ignore[arg-type]
        return {
            ("50 %", "magnitude"): Magnitude(0.5, exclude=EXCLUDED),
            ("50 %", "wanda"): Wanda(0.5, exclude=EXCLUDED),
            ("50 %", "leap"): LEAP(0.5, training),
            ("2:4", "magnitude"): Magnitude(pattern="2:4", exclude=EXCLUDED),
            ("2:4", "wanda"): Wanda(pattern="2:4", exclude=EXCLUDED),
            ("2:4", "maskllm"): MaskLLM("2:4", clipped),
        }


def train_network(study: LanguageStudy, text: Text) -> SmallLlama:
    """A network that was trained on the training text."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(study.seed)
        network = SmallLlama(len(text.letters), study.width, study.layers, study.heads, study.hidden)
    optimizer = torch.optim.AdamW(network.parameters(), lr=study.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, study.steps)
    for inputs, labels in text.batches(study.seed, study.steps, study.rows, study.length):
        loss = F.cross_entropy(network(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def cross_entropy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Mean over all letters, in nats."""
    network.eval()
    total = 0.0
    for x, y in zip(torch.split(inputs, _SLICE), torch.split(labels, _SLICE), strict=True):
        total += float(F.cross_entropy(network(x).flatten(0, 1).double(), y.flatten(), reduction="sum"))
    return total / labels.numel()


def pruned(network: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network in which weights that are not kept are 0."""
    copied = copy.deepcopy(network)
    for name, mask in keep.items():
        weight = copied.get_parameter(f"{name}.weight")
        weight.data = torch.where(mask, weight.data, torch.zeros(()))
    return copied


def run(study: LanguageStudy, folder: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, prune, measure; writes results.json, table.md and perplexity.svg into `folder` and returns the results."""
    text, begun = Text(), time.perf_counter()
    say(f"text: {SOURCE}; {len(text.train):,} to train on, {len(text.test):,} held out")
    network = train_network(study, text)
    held_out = text.held_out(study.pieces, study.length)
    dense = math.exp(cross_entropy(network, *held_out))
    say(f"dense: perplexity {dense:.3f} a letter, after {time.perf_counter() - begun:.0f} s")
    known = next(text.batches(10**6, 1, 64, study.length))
    task = SourceTask(
        batches=lambda epoch: text.batches(1000 + epoch, 50, study.rows, study.length),
        steps_per_epoch=50,
        loss=lambda net: cross_entropy(net, *known),
        seed=study.seed,
    )
    rows = []
    for (sparsity, name), method in study.methods().items():
        since = time.perf_counter()
        found: FoundMask = method.find(network, task)
        perplexity = math.exp(cross_entropy(pruned(network, found.keep or {}), *held_out))
        row = {"sparsity": sparsity, "method": name, "density": found.fraction_kept, "perplexity": perplexity,
               "seconds": round(time.perf_counter() - since, 1)}  # fmt: skip
        rows.append(row)
        say(f"{sparsity} {name}: perplexity {perplexity:.3f}, density {found.fraction_kept:.4f}")
    results = {"text": SOURCE, "study": asdict(study), "machine": machine(), "dense": dense, "rows": rows,
               "seconds": round(time.perf_counter() - begun, 1)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomic(folder / "table.md", table(results).encode())
    write_atomic(folder / "perplexity.svg", figure(results))
    return results


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    import dwm_fast

    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dwm-fast": dwm_fast.__version__,
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row a method."""
    lines = ["| sparsity | method | density | perplexity a letter |", "|---|---|---|---|"]
    lines.append(f"| dense | - | 1.0000 | {results['dense']:.3f} |")
    for row in results["rows"]:
        lines.append(f"| {row['sparsity']} | {row['method']} | {row['density']:.4f} | {row['perplexity']:.3f} |")
    return "\n".join(lines) + "\n"


def figure(results: Mapping[str, Any]) -> bytes:
    """A bar a method, and the dense network's line, as SVG."""
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dwm-fast", "font.size": 9}):
        from matplotlib.figure import Figure

        drawing = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = drawing.subplots()
        names = [f"{row['method']}\n{row['sparsity']}" for row in results["rows"]]
        learned = ["#0072b2" if row["method"] in ("leap", "maskllm") else "#999999" for row in results["rows"]]
        axes.bar(names, [row["perplexity"] for row in results["rows"]], color=learned)
        axes.axhline(results["dense"], color="#222222", linestyle="--", label=f"dense, {results['dense']:.2f}")
        axes.set_ylabel("perplexity a letter, held-out text")
        axes.set_title(results["text"], fontsize=8)
        axes.legend(frameon=False)
        out = io.BytesIO()
        drawing.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
