"""Every configuration compiles for GPUs that are not here, without spills and within shared memory."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("target", "match"),
    [(90, ""), (80, "hard fp32,bf16"), (100, "hard fp32,bf16")],
)
@pytest.mark.timeout(900)
def test_no_configuration_spills(target, match):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dwm_fast.kernels._compile", "--target", str(target), "--match", match]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"sm_{target} ") >= 3


def test_the_interpreter_has_nothing_to_compile():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "dwm_fast.kernels._compile", "--target", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
