"""Tables of addresses and of structure: on the device before anybody reads them, on any stream and in any graph."""

from __future__ import annotations

import gc

import pytest
import torch

from dwm_fast import ops
from dwm_fast.errors import InputError
from dwm_fast.kernels import _pointers, _tables
from dwm_fast.ops.draw import Mode

from .device import GPU, Copy, FakeEvent, Race, bytes_of
from .tensors import DeviceTensor

pytestmark = pytest.mark.filterwarnings("ignore:dwm_fast. backend 'cuda' is not used")


def network(device="cuda:0", shapes=((8, 4, 3, 3), (5, 7))):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(2)]


def noise(device="cuda:0"):
    return torch.tensor([5, 2], device=device), torch.tensor(0.7, device=device)


def kernels(gpu):
    return [x.kernel for x in gpu.launches]


def on_another_stream(gpu):
    """A stream that has waited for all that the test has set up, and nothing else."""
    stream = torch.cuda.Stream("cuda:0")
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def test_a_network_s_tables_are_copied_once_from_pinned_memory_and_waited_for(gpu):
    logits, weights = network()
    state, tau = noise()
    gpu.copies.clear(), gpu.syncs.clear()
    for _ in range(3):
        ops.sample(logits, weights, state, tau)
    assert gpu.copies == [Copy("to device", True, True, gpu.stream())]
    assert gpu.syncs == ["Stream.synchronize"]
    assert kernels(gpu).count("write_pointers_kernel") == 1
    assert kernels(gpu).count("sample_fwd_kernel") == 3


def test_the_device_of_the_tensors_is_current_at_every_launch_and_the_caller_s_afterwards(gpu):
    logits, weights = network("cuda:1")
    gpu.guards.clear()
    ops.sample(logits, weights, *noise("cuda:1"))
    assert gpu.guards == [1]
    assert {x.device.index for x in gpu.launches} == {1}
    assert torch.cuda.current_device() == 0


def test_another_stream_waits_for_a_table_once_and_tells_the_allocator(gpu):
    logits, weights = network()
    state, tau = noise()
    stream = on_another_stream(gpu)
    ops.sample(logits, weights, state, tau)
    (entry,) = _pointers._entries.values()
    for _ in range(2):
        with torch.cuda.stream(stream):
            ops.sample(logits, weights, state, tau)
    assert [entry for entry in gpu.log if entry[0] == "wait_event"] == [("wait_event", stream)]
    assert gpu.recorded == [(entry.table.data_ptr(), stream)]
    assert entry.streams == {gpu.defaults[0].cuda_stream, stream.cuda_stream}


def test_a_table_that_is_not_waited_for_is_a_race(gpu, monkeypatch):
    logits, weights = network()
    state, tau = noise()
    stream = on_another_stream(gpu)
    ops.sample(logits, weights, state, tau)
    monkeypatch.setattr(type(stream), "wait_event", lambda self, event: None)
    with pytest.raises(Race), torch.cuda.stream(stream):
        ops.sample(logits, weights, state, tau)


def test_a_gradient_at_a_new_address_makes_a_new_table_and_writes_no_old_one(gpu):
    logits, weights = network()
    state, tau = noise()
    ops.sample(logits, weights, state, tau)
    (first,) = _pointers._entries.values()
    before = bytes_of(gpu.memory_of(first.table.inner)).clone()
    ops.sample([x.clone() for x in logits], weights, state, tau)
    assert len(_pointers._entries) == 2
    assert torch.equal(bytes_of(gpu.memory_of(first.table.inner)), before)


def capture(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_a_captured_draw_uses_the_known_tables_and_keeps_them(gpu):
    logits, weights = network()
    state, tau = noise()

    def draw():
        return ops.sample(logits, weights, ops.advance(state), tau)[0]

    eager = [[m.cpu() for m in draw()] for _ in range(3)]
    state.copy_(torch.tensor([5, 2], device="cuda:0"))
    count = len(gpu.launches)
    graph, masked = capture(draw)
    assert "write_pointers_kernel" not in kernels(gpu)[count:]
    assert state.tolist() == [5, 2]
    _tables._plans.clear()
    _pointers._entries.clear()
    gc.collect()
    for expected in eager:
        graph.replay()
        assert all(torch.equal(m.cpu(), e) for m, e in zip(masked, expected, strict=True))
    assert state.tolist() == [5, 5]


def test_a_graph_whose_tables_nobody_keeps_is_found_out(gpu, monkeypatch):
    logits, weights = network()
    state, tau = noise()
    ops.sample(logits, weights, state, tau)
    graph, _ = capture(lambda: ops.sample(logits, weights, state, tau))
    for module in (_tables, _pointers):
        module._kept.clear()
    _tables._plans.clear()
    _pointers._entries.clear()
    gc.collect()
    with pytest.raises(AssertionError, match="freed"):
        graph.replay()


def test_addresses_that_a_capture_brings_are_written_again_by_every_replay(gpu):
    logits, weights = network()
    state, tau = noise()
    ops.sample(logits, weights, state, tau)
    known = len(_pointers._entries)
    graph, masked = capture(lambda: ops.sample([x.clone() for x in logits], weights, state, tau, mode=Mode.KEEP)[0])
    assert gpu.launches[-2].kernel == "write_pointers_kernel"
    assert gpu.launches[-2].captured
    assert len(_pointers._entries) == known
    logits[0].neg_()
    graph.replay()
    assert torch.equal(masked[0].cpu(), (weights[0] * (logits[0] >= 0)).cpu())


def test_a_structure_that_a_capture_brings_is_one_clear_error(gpu):
    logits, weights = network()
    state, tau = noise()
    with pytest.raises(InputError, match="run the step once before the capture"):
        capture(lambda: ops.sample(logits, weights, state, tau))
    assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.parametrize("which", ["logits", "weights"])
def test_lists_on_two_devices_are_one_clear_error(gpu, which):
    logits, weights = network()
    {"logits": logits, "weights": weights}[which][1] = torch.zeros(5, 7)
    with pytest.raises(InputError, match=r"cuda:0 and cpu; expected one device: move them with \.to\('cuda:0'\)"):
        ops.sample(logits, weights, *noise())
    with pytest.raises(InputError, match="cpu and cuda:0"):
        ops.sample(logits, weights, torch.tensor([5, 2]), torch.tensor(1.0))


@pytest.mark.parametrize("which", ["logits", "weights"])
def test_lists_on_two_devices_are_found_in_a_capture_too(gpu, which):
    """There a table of addresses is written by the graph, and known ones are used without another look."""
    logits, weights = network()
    state, tau = noise()
    ops.sample(logits, weights, state, tau)
    {"logits": logits, "weights": weights}[which][1] = torch.zeros(5, 7)
    with pytest.raises(InputError, match="cuda:0 and cpu; expected one device"):
        capture(lambda: ops.sample(logits, weights, state, tau))


def test_a_product_s_operands_on_two_devices_are_one_clear_error(gpu):
    state, tau = noise()
    x, weight = torch.randn(2, 8, device="cuda:0"), torch.randn(4, 8)
    with pytest.raises(InputError, match="expected one device"):
        ops.linear(x, weight, weight, None, state, tau)
    with pytest.raises(InputError, match="cuda:0 and cuda:1"):
        ops.linear_packed(x, weight.to("cuda:0"), ops.pack([weight.to("cuda:1") > 0]))
    assert "masked_product_kernel" not in kernels(gpu)


# --- the fake itself: what a GPU refuses, it refuses ----------------------------------------------------------------


def test_every_name_is_torch_s_and_takes_torch_s_arguments(gpu):
    with pytest.raises(AttributeError):
        torch.cuda.is_current_streamcapturing  # noqa: B018
    with pytest.raises(AttributeError):
        torch.cuda.current_stream().waitfor(FakeEvent())
    with pytest.raises(TypeError):
        torch.cuda.is_current_stream_capturing(torch.device("cuda"))
    with pytest.raises(TypeError):
        torch.cuda.current_stream("cuda:0", 1)


def test_what_waits_is_refused_in_a_capture_and_where_waiting_is_an_error(gpu):
    x = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        x.cpu()
    torch.cuda.set_sync_debug_mode("default")
    assert x.cpu().tolist() == [1, 1, 1]


def test_work_of_two_streams_on_one_tensor_without_a_wait_is_a_race(gpu):
    x = torch.ones(3, device="cuda:0")
    stream = on_another_stream(gpu)
    x.add_(1)
    with pytest.raises(Race), torch.cuda.stream(stream):
        x.mul_(2)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x.mul(2)
    with pytest.raises(Race):
        x.add_(1)
    assert isinstance(y, DeviceTensor)
    assert GPU.now() is gpu


def test_operands_on_two_devices_are_refused(gpu):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda:0") + torch.ones(3)
