"""Importing dwm_fast is cheap and harmless: torch alone, no device, no Triton."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None          # any import of it raises
import torch
before = set(sys.modules)
import dwm_fast
import dwm_fast.ops, dwm_fast.nn
new = {name.partition(".")[0] for name in set(sys.modules) - before}
unwanted = new & {"matplotlib", "pyarrow", "typer", "rich", "PIL", "torchvision", "yaml", "constriction"}
assert not unwanted, unwanted
assert not any(name.startswith(("dwm_fast.kernels", "dwm_fast.ops._extension")) for name in sys.modules)
assert not torch.cuda.is_initialized()
assert all(hasattr(dwm_fast, name) for name in dwm_fast.__all__)

masked = dwm_fast.mask_model(torch.nn.Linear(4, 3), dwm_fast.GumbelSigmoid(), seed=1).train()
with dwm_fast.use_backend("reference"):
    (masked(torch.ones(2, 4)).sum() + masked.sparsity_penalty()).backward()
assert all(p.grad is not None for p in masked.mask_parameters())
try:
    with dwm_fast.use_backend("triton"):
        masked(torch.ones(2, 4))
except dwm_fast.BackendUnavailable as error:
    assert "\\n" not in str(error)
else:
    raise AssertionError("triton was asked for and is blocked")
print("fine")
"""


def test_a_fresh_process_without_triton_imports_and_trains_and_touches_no_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:dwm_fast", "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
