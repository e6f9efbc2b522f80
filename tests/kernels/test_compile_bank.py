"""Mixed-domain products compile for a GPU that is not here, and nothing spills."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import torch
from dwm_fast.kernels import bank
from dwm_fast.kernels._compile import Configuration, compile_configuration

for dtype in (torch.bfloat16, torch.float32):
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = (pointer, pointer, "*i32", pointer, "*i64", pointer, *["i32"] * 6)
    for k in (64, 50):
        for tiles in (bank.tiles_for(4, 4, 512, k, dtype), bank.MANY):
            kernel = bank.bank_linear_few_fwd_kernel if tiles.group else bank.bank_linear_many_fwd_kernel
            constants = {"HAS_BIAS": True, "ALIGNED": k == 64, "PRECISION": "tf32", "BLOCK_N": tiles.block_n,
                         "BLOCK_K": tiles.block_k, "BLOCK_M": tiles.block_m}
            if tiles.group:
                constants["GROUP"] = tiles.group
            usage = compile_configuration(Configuration("bank", kernel, types, constants, tiles.num_warps), 90)
            print(dtype, k, tiles, usage, flush=True)
            assert usage.spilled == 0 and usage.shared <= 227 * 1024
"""


@pytest.mark.timeout(900)
def test_no_configuration_spills_on_sm_90():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Usage(") == 8
