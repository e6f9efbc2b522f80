"""Who computes: forcing a backend, choosing one, and doing without one."""

from __future__ import annotations

import sys
import threading
import types
import warnings

import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable, DwmError, InputError
from dwm_fast.ops import _backends


@pytest.fixture
def table(monkeypatch):
    """The table of backends with every implementation of `count` replaced by what a test registers."""
    monkeypatch.delenv("DWM_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "_targets", {k: v for k, v in _backends._targets.items() if k[0] != "count"})
    module = types.ModuleType("implementations_of_count")
    module.answer, module.other = answer, other
    monkeypatch.setitem(sys.modules, module.__name__, module)
    _backends._probe.cache_clear()
    _backends._warn_once.cache_clear()
    yield lambda backend, name: _backends.register("count", backend, f"{module.__name__}:{name}")
    _backends._probe.cache_clear()
    _backends._warn_once.cache_clear()


def answer(bits, numels):
    return torch.tensor([42])


def other(bits, numels):
    return torch.tensor([7])


def _count() -> int:
    return int(ops.count(torch.zeros(16, dtype=torch.uint8), [3])[0])


def test_an_unknown_name_is_refused_before_anything_runs():
    expected = "use_backend got 'Triton'; expected one of reference, cpp, triton, cuda"
    with pytest.raises(InputError, match=expected), dwm_fast.use_backend("Triton"):
        pass


def test_an_unknown_name_in_the_environment_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("DWM_FAST_BACKEND", "fast")
    with pytest.raises(InputError, match="DWM_FAST_BACKEND is 'fast'; expected one of reference"):
        _count()
    with dwm_fast.use_backend("reference"):
        assert _count() == 0


def test_the_environment_forces_a_backend_and_use_backend_outranks_it(table, monkeypatch):
    table("reference", "answer")
    table("cpp", "other")
    assert _count() == 7
    monkeypatch.setenv("DWM_FAST_BACKEND", "reference")
    assert _count() == 42
    with dwm_fast.use_backend("cpp"):
        assert _count() == 7
    monkeypatch.setenv("DWM_FAST_BACKEND", "")
    assert _count() == 7


def test_blocks_nest_and_end_even_after_an_error(table):
    table("reference", "answer")
    table("cpp", "other")
    with dwm_fast.use_backend("reference"):
        with dwm_fast.use_backend("cpp"):
            assert _count() == 7
        with dwm_fast.use_backend(None):
            assert _count() == 7
        with pytest.raises(ZeroDivisionError), dwm_fast.use_backend("cpp"):
            _ = 1 / 0
        assert _count() == 42
    assert _count() == 7


def test_a_forced_backend_holds_on_other_threads_as_autograd_needs(table):
    table("reference", "answer")
    table("cpp", "other")
    seen = []
    with dwm_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_count()))
        thread.start()
        thread.join()
    assert seen == [42]


def test_a_missing_implementation_falls_through_with_one_warning(table):
    _backends.register("count", "cpp", "dwm_fast.no_such_module:count")
    table("reference", "answer")
    with pytest.warns(RuntimeWarning, match="backend 'cpp' is not used: No module named 'dwm_fast.no_such_module'"):
        assert _count() == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _count() == 42


def test_whatever_a_backend_raises_while_loading_is_one_line_and_never_an_error(table, monkeypatch):
    def explode(name):
        raise OSError("cannot load the library\nwith a second line")

    _backends.register("count", "cpp", "somewhere:count")
    table("reference", "answer")
    assert _backends.get("count", "mps") is answer
    monkeypatch.setattr(_backends, "importlib", types.SimpleNamespace(import_module=explode))
    with pytest.warns(RuntimeWarning, match="not used: cannot load the library$"):
        assert _count() == 42


def test_a_forced_backend_that_cannot_run_says_why(table):
    _backends.register("count", "cpp", "dwm_fast.no_such_module:count")
    table("reference", "answer")
    with dwm_fast.use_backend("cpp"), pytest.raises(BackendUnavailable, match="'cpp' was asked for and cannot run"):
        _count()


def test_a_forced_backend_without_the_operation_says_so(table):
    table("reference", "answer")
    with dwm_fast.use_backend("cpp"), pytest.raises(BackendUnavailable, match="'cpp' was asked for and has no 'count'"):
        _count()


@pytest.mark.parametrize(("name", "hint"), [("triton", "TRITON_INTERPRET=1"), ("cuda", "move the tensors")])
def test_gpu_backends_refuse_cpu_tensors_in_one_line(name, hint, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with dwm_fast.use_backend(name), pytest.raises(BackendUnavailable) as caught:
        _count()
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DwmError)


def test_the_interpreter_lets_triton_take_cpu_tensors(table, monkeypatch):
    table("triton", "other")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dwm_fast.use_backend("triton"):
        assert _count() == 7


def test_the_fastest_available_backend_of_the_device_is_taken(table):
    for backend, name in (("reference", "answer"), ("cpp", "other"), ("triton", "other"), ("cuda", "answer")):
        table(backend, name)
    assert _backends.get("count", "cpu") is other
    assert _backends.get("count", "cuda") is answer
    assert _backends.get("count", "mps") is answer


def test_every_operation_has_a_reference():
    operations = {op for op, _ in _backends._targets}
    assert {"sample", "sample_backward", "pack", "unpack", "apply", "count", "combine", "overlap"} <= operations
    assert {"linear", "conv2d", "linear_packed", "conv2d_packed", "advance"} <= operations
    for op in operations:
        assert _backends.availability(op)["reference"] == "ready"


def test_availability_gives_the_reason_for_each_backend(table):
    table("reference", "answer")
    _backends.register("count", "cpp", "dwm_fast.no_such_module:count")
    assert _backends.availability("count") == {
        "reference": "ready",
        "cpp": "No module named 'dwm_fast.no_such_module'",
    }


def test_the_noise_step_advances_whatever_is_forced(table):
    state = torch.tensor([1, 2])
    with dwm_fast.use_backend("cpp"):
        ops.advance(state)
    assert state.tolist() == [1, 3]
