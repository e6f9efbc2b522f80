"""Triton kernels: one launch for a whole network. Imported only when an operation first needs them."""

import os

import torch

if os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available():
    from dwm_fast.ops._toolchain import require_triton_launcher

    require_triton_launcher()
