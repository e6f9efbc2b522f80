"""Who computes: forcing a backend, choosing one, and doing without one."""

from __future__ import annotations

import functools
import threading
import warnings

import pytest
import torch

import dwm_fast
from dwm_fast import ops
from dwm_fast.errors import BackendUnavailable, DwmError, InputError
from dwm_fast.ops import backends


@pytest.fixture
def table(monkeypatch):
    """A table of backends in which nobody computes `count` but who a test names: a function, or what loading raises."""
    monkeypatch.delenv("DWM_FAST_BACKEND", raising=False)
    others = {op: function for op, function in backends.REFERENCES.items() if op != "count"}
    named = {"reference": others, "cpp": {}, "triton": {}, "cuda": {}}

    def name(backend, found):
        named[backend] = found if isinstance(found, Exception) else {**named[backend], "count": found}
        backends._loaded.cache_clear()

    def load(backend):
        if isinstance(named[backend], Exception):
            raise named[backend]
        return named[backend]

    monkeypatch.setattr(backends, "_TABLE", {b: functools.partial(load, b) for b in named})
    backends._loaded.cache_clear()
    backends._warn_once.cache_clear()
    yield name
    backends._loaded.cache_clear()
    backends._warn_once.cache_clear()


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
    table("reference", answer)
    table("cpp", other)
    assert _count() == 7
    monkeypatch.setenv("DWM_FAST_BACKEND", "reference")
    assert _count() == 42
    with dwm_fast.use_backend("cpp"):
        assert _count() == 7
    monkeypatch.setenv("DWM_FAST_BACKEND", "")
    assert _count() == 7


def test_blocks_nest_and_end_even_after_an_error(table):
    table("reference", answer)
    table("cpp", other)
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
    table("reference", answer)
    table("cpp", other)
    seen = []
    with dwm_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_count()))
        thread.start()
        thread.join()
    assert seen == [42]


def test_a_missing_implementation_falls_through_with_one_warning(table):
    table("cpp", ModuleNotFoundError("No module named 'nowhere'"))
    table("reference", answer)
    with pytest.warns(RuntimeWarning, match="backend 'cpp' is not used: No module named 'nowhere'"):
        assert _count() == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _count() == 42


def test_whatever_a_backend_raises_while_loading_is_one_line_and_never_an_error(table):
    table("cpp", OSError("cannot load the library\nwith a second line"))
    table("reference", answer)
    assert backends.chosen("count", "mps") == "reference"
    with pytest.warns(RuntimeWarning, match="not used: cannot load the library$"):
        assert _count() == 42


def test_a_forced_backend_that_cannot_run_says_why(table):
    table("cpp", ModuleNotFoundError("No module named 'nowhere'"))
    table("reference", answer)
    with dwm_fast.use_backend("cpp"), pytest.raises(BackendUnavailable, match="'cpp' was asked for and cannot run"):
        _count()


def test_a_forced_backend_without_the_operation_says_so(table):
    table("reference", answer)
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
    table("triton", other)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dwm_fast.use_backend("triton"):
        assert _count() == 7


def test_the_fastest_available_backend_of_the_device_is_taken(table):
    for backend, name in (("reference", answer), ("cpp", other), ("triton", other), ("cuda", answer)):
        table(backend, name)
    for device, backend, function in (("cpu", "cpp", other), ("cuda", "cuda", answer), ("mps", "reference", answer)):
        assert backends.chosen_for("count", device) == (backend, function)


def test_every_operation_has_a_reference():
    operations = {
        str(schema).partition("::")[2].partition("(")[0]
        for schema in torch._C._jit_get_all_schemas()
        if str(schema).startswith("dwm_fast::")
    }
    assert {"sample", "sample_backward", "pack", "unpack", "apply", "count", "combine", "overlap"} <= operations
    assert {"linear", "conv2d", "linear_packed", "conv2d_packed", "advance"} <= operations
    for op in operations:
        assert backends.availability(op)["reference"] == "ready"


def test_availability_gives_the_reason_for_each_backend(table):
    table("reference", answer)
    table("cpp", ModuleNotFoundError("No module named 'nowhere'"))
    assert backends.availability("count") == {
        "reference": "ready",
        "cpp": "No module named 'nowhere'",
    }


def test_the_noise_step_advances_whatever_is_forced(table):
    state = torch.tensor([1, 2])
    with dwm_fast.use_backend("cpp"):
        ops.advance(state)
    assert state.tolist() == [1, 3]
