"""Triton's own C module cannot be built: one line that says what to type, and another backend computes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dwm_fast
from dwm_fast import doctor, ops
from dwm_fast.errors import BackendUnavailable
from dwm_fast.ops import _toolchain, backends

triton = pytest.importorskip("triton")


class Driver:
    """As triton.runtime.driver: `active` is built by Triton's own builder, from C source, at its first use."""

    def __init__(self) -> None:
        self.built = 0

    @property
    def active(self) -> object:
        from triton.runtime.build import compile_module_from_src

        source = """
            #include <Python.h>
            static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "dwm_probe", NULL, -1, NULL};
            PyMODINIT_FUNC PyInit_dwm_probe(void) { return PyModule_Create(&module); }
        """
        utils = compile_module_from_src(source, "dwm_probe")
        self.built += 1
        return SimpleNamespace(utils=utils)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """Triton's builder with an empty cache, and a release that compiles no launcher for each signature."""
    import triton.backends.nvidia.driver as nvidia
    import triton.runtime

    if hasattr(triton.runtime.build, "_find_compiler"):
        triton.runtime.build._find_compiler.cache_clear()
    made = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton.runtime, "driver", made)
    monkeypatch.delattr(nvidia, "make_launcher", raising=False)
    return made


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))


def no_header(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(_toolchain, "python_header", lambda: folder / "Python.h")


def test_with_compiler_and_headers_triton_builds_its_driver(driver) -> None:
    _toolchain.require_triton_launcher()
    assert driver.built == 1


@pytest.mark.parametrize(("lack", "advice"), [(no_compiler, "apt install gcc"), (no_header, "apt install python3-dev")])
def test_what_is_missing_is_one_line_and_no_compiler_is_called(driver, monkeypatch, tmp_path, capfd, lack, advice):
    lack(monkeypatch, tmp_path)
    called = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: called.append(a))
    with pytest.raises(BackendUnavailable, match=advice) as raised:
        _toolchain.require_triton_launcher()
    assert len(str(raised.value).splitlines()) == 1
    assert not called
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lack", [no_compiler, no_header])
def test_a_driver_in_triton_s_cache_needs_no_compiler(driver, monkeypatch, tmp_path, lack):
    _toolchain.require_triton_launcher()
    lack(monkeypatch, tmp_path)
    _toolchain.require_triton_launcher()
    assert driver.built == 2


def test_a_release_that_compiles_every_launcher_needs_one_whatever_is_cached(driver, monkeypatch, tmp_path):
    import triton.backends.nvidia.driver as nvidia

    _toolchain.require_triton_launcher()
    monkeypatch.setattr(nvidia, "make_launcher", lambda: None, raising=False)
    no_compiler(monkeypatch, tmp_path)
    with pytest.raises(BackendUnavailable, match="no C compiler"):
        _toolchain.require_triton_launcher()


def test_a_compiler_that_fails_is_one_line_too(driver, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BackendUnavailable, match="cannot start its CUDA driver") as raised:
        _toolchain.require_triton_launcher()
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture
def without_launcher(gpu, driver, monkeypatch, tmp_path):
    """A GPU where Triton does not interpret, and no C compiler."""
    import importlib

    import dwm_fast.kernels

    no_compiler(monkeypatch, tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_TABLE", {**backends._TABLE, "triton": lambda: importlib.reload(dwm_fast.kernels)})
    backends._loaded.cache_clear()
    backends._warn_once.cache_clear()
    return gpu


def test_without_a_launcher_the_reference_computes_after_one_warning(without_launcher):
    logits, weight = torch.tensor([3.0, -3.0]).to("cuda:0"), torch.tensor([1.0, 2.0]).to("cuda:0")
    state, tau = torch.tensor([7, 0], device="cuda:0"), torch.tensor(1.0, device="cuda:0")
    with pytest.warns(RuntimeWarning, match="backend 'triton' is not used: .*apt install gcc") as seen:
        (masked, _, _), _ = [ops.sample([logits], [weight], state, tau, mode=ops.Mode.KEEP) for _ in range(2)]
    assert len([w for w in seen if "'triton'" in str(w.message)]) == 1
    assert masked[0].tolist() == [1, 0]
    assert not without_launcher.launches
    with dwm_fast.use_backend("triton"), pytest.raises(BackendUnavailable, match="apt install gcc"):
        ops.sample([logits], [weight], state, tau)


@pytest.mark.filterwarnings("ignore:dwm_fast. backend")
def test_doctor_says_what_does_not_launch(without_launcher):
    lines = doctor.diagnose()
    assert "  sample: reference" in lines[lines.index("operations on cuda:") :]
    assert any(line.startswith("backend triton is not used: Triton compiles its launcher") for line in lines)


@pytest.mark.filterwarnings("ignore:dwm_fast. backend")
def test_doctor_draws_once_on_every_gpu(gpu, monkeypatch):
    lines = doctor.diagnose()
    assert lines[1] == "GPU: Fake GPU 0, Fake GPU 1"
    assert "  sample: triton" in lines[lines.index("operations on cuda:") :]
    drawn = [line for line in lines if line.startswith("a draw on")]
    assert drawn == ["a draw on cuda:0: works", "a draw on cuda:1: works"]
    assert {x.device.index for x in gpu.launches} == {0, 1}


@pytest.mark.filterwarnings("ignore:dwm_fast. backend")
@pytest.mark.parametrize("answer", ["raises", "is wrong"])
def test_doctor_tells_a_draw_that_fails_from_one_that_works(gpu, monkeypatch, answer):
    def sample(logits, weights, *rest, **rule):
        if answer == "raises":
            raise AttributeError("module 'torch.cuda' has no attribute 'is_current_streamcapturing'\nmore")
        return [w.clone() for w in weights], ops.pack([w > 0 for w in weights]), None

    monkeypatch.setattr(ops, "sample", sample)
    (line, _) = [line for line in doctor.diagnose() if line.startswith("a draw on")]
    assert ("fails: module 'torch.cuda' has no attribute" if answer == "raises" else "gives wrong numbers") in line
