"""Configurations compile for GPUs that are not here, and come out as they are meant to; `.ci/run` compiles them all."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("target", "match"), [(90, "linear M=16 K=4096 bits"), (80, "conv2d bits")])
@pytest.mark.timeout(900)
def test_configurations_come_out_as_meant(target, match):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dwm_fast.kernels._compile", "--target", str(target), "--match", match]
    result = subprocess.run([*command, "--jobs", "1"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"sm_{target} " in result.stdout


def test_the_interpreter_has_nothing_to_compile():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "dwm_fast.kernels._compile", "--target", "90"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
