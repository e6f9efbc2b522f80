"""What works on this machine, what does not, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable
from dwm_fast.ops import backends

_OPTIONAL = {
    "constriction": "entropy-coded mask files: pip install 'dwm-fast[coding]'",
    "huggingface_hub": "downloads and pushes: pip install 'dwm-fast[hub]'",
    "triton": "GPU kernels: comes with torch's CUDA build",
    "ninja": "faster builds of the extension: pip install 'dwm-fast[build]'",
}
_SHOWN = ("sample", "sample_backward", "mask_adam", "frozen_adamw", "pack", "linear_packed")


def diagnose() -> list[str]:
    """Lines to print: versions, devices, who computes each operation here, and optional packages."""
    lines = [
        f"dwm-fast {dwm_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        _gpu_line(),
    ]
    forced = backends.forced_backend()
    if forced:
        lines.append(f"backend forced to '{forced}' (DWM_FAST_BACKEND)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        lines.append(f"operations on {device}:")
        lines += [f"  {op}: {_chosen(op, device)}" for op in _SHOWN]
    lines += _first_draws()
    lines += _unused_backends()
    for package, use in _OPTIONAL.items():
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}: present")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed; {use}")
    return lines


def _chosen(op: str, device: str) -> str:
    try:
        return backends.chosen(op, device)
    except BackendUnavailable as error:
        return f"cannot run: {error}"


def _unused_backends() -> list[str]:
    """A line for each reason why a backend computes none, or not all, of the operations that it could."""
    failing: dict[tuple[str, str], list[str]] = {}
    ready = set()
    for op in _SHOWN:
        for backend, reason in backends.availability(op).items():
            if reason == "ready":
                ready.add(backend)
            else:
                failing.setdefault((backend, reason), []).append(op)
    return [
        f"backend {backend} is not used{' for ' + ', '.join(ops) if backend in ready else ''}: {reason}"
        for (backend, reason), ops in failing.items()
    ]


def _first_draws() -> list[str]:
    """For each GPU, whether one small draw on it comes out right: a backend that loads may still fail to launch."""
    lines = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in (torch.device("cuda", i) for i in range(count)):
        try:
            answer = "works" if _draw_is_right(device) else "gives wrong numbers; please report it with these lines"
        except Exception as error:
            answer = f"fails: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        lines.append(f"a draw on {device}: {answer}")
    return lines


def _draw_is_right(device: torch.device) -> bool:
    """Whether `sample` keeps the weights whose logits are not negative, in its weights and in its bits."""
    logits = torch.arange(-100, 101, dtype=torch.float32)
    weight = torch.arange(1, 202, dtype=torch.float32)
    state, tau = torch.zeros(2, dtype=torch.int64, device=device), torch.ones((), device=device)
    masked, bits, _ = ops.sample([logits.to(device)], [weight.to(device)], state, tau, mode=ops.Mode.KEEP, pack=True)
    keep = ops.unpack(bits, [201])[0].cpu()
    return torch.equal(masked[0].cpu(), weight * (logits >= 0)) and torch.equal(keep, logits >= 0)


def _gpu_line() -> str:
    if not torch.cuda.is_available():
        return "GPU: none that torch can use; everything runs on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"GPU: {', '.join(names)}"
