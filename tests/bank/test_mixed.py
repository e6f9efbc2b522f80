"""Mixed batches: every sample gets exactly what its own domain gives it, whatever else is in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dwm_fast.bank import MaskBank
from dwm_fast.errors import InputError

from . import nets

DOMAINS = ("photo", "art", "cartoon", "sketch")


def _bank(own: bool, classes: tuple[int, ...] = (4, 7, 2, 7)) -> MaskBank:
    net = nets.small_net()
    bank = MaskBank(net)
    for i, name in enumerate(DOMAINS):
        state = nets.state_for(net, i, classes[i]) if own else None
        bank.add(name, nets.masks_for(net, i, names=nets.MASKED[: 3 - i % 2]), state=state)
    return bank


def _by_loop(bank: MaskBank, x: Tensor, domains: list[str]) -> dict[str, Tensor]:
    outputs = {}
    for name in dict.fromkeys(domains):
        bank.activate(name)
        outputs[name] = bank(x[[i for i, d in enumerate(domains) if d == name]])
    bank.activate(None)
    return outputs


def _assert_equals_loop(bank: MaskBank, x: Tensor, domains: list[str]) -> None:
    y = bank(x, domains=domains)
    for name, expected in _by_loop(bank, x, domains).items():
        found = y[[i for i, d in enumerate(domains) if d == name]]
        width = expected.shape[1]
        assert torch.equal(found[:, :width], expected)
        assert (found[:, width:] == -torch.inf).all()


@settings(max_examples=40, deadline=None)
@given(
    own=st.booleans(),
    domains=st.lists(st.sampled_from(DOMAINS), min_size=1, max_size=9),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_mixed_batch_equals_the_loop_over_domains_exactly(
    own: bool, domains: list[str], last: bool, seed: int
) -> None:
    x = torch.randn(len(domains), 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    bank = _bank(own)
    _assert_equals_loop(bank, x, domains)
    assert bank.serve(sorted(set(domains))).layerwise


class _Wide(nn.Module):
    """A weight so large that few rows are multiplied straight from bits, between small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 2048)
        self.large = nn.Linear(2048, 2048)
        self.fc = nn.Linear(2048, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.large(torch.relu(self.first(x)))))


@pytest.mark.parametrize("shape", [(24,), (3, 24)], ids=["rows", "tokens"])
def test_large_layers_give_a_mixed_batch_exactly_what_they_give_a_domain_alone(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = _Wide().eval()
    bank = MaskBank(net)
    small, large = "first.weight", "large.weight"
    by_output = {small: torch.rand(2048, 24) < 0.5, large: torch.rand(2048, 1) < 0.5}
    bank.add("photo", nets.masks_for(net, 0, names=(small, large)), state={"large.bias": torch.randn(2048)})
    bank.add("art", by_output)  # a bit for every output
    bank.add("cartoon", nets.masks_for(net, 2, names=(small,)))  # the large weight as it is
    bank.add("sketch", nets.masks_for(net, 3, names=(large,)), state={"large.bias": torch.randn(2048)})
    domains = ["sketch", "photo", "art", "cartoon", "photo", "sketch", *["art"] * 17]
    x = torch.randn(len(domains), *shape)
    with torch.no_grad():
        assert bank.serve(DOMAINS).layerwise
        y = bank(x, domains=domains)
        for name in DOMAINS:
            rows = [i for i, d in enumerate(domains) if d == name]
            bank.activate(name)
            assert torch.equal(y[rows], bank(x[rows]))
        bank.activate(None)
        assert torch.equal(bank(x), net(x))


def test_a_large_layer_read_from_bits_passes_gradients_on() -> None:
    torch.manual_seed(0)
    net = _Wide().eval()
    bank = MaskBank(net)
    masks = nets.masks_for(net, 0, names=("large.weight",))
    bank.add("photo", masks)
    bank.activate("photo")
    x = torch.randn(2, 24, dtype=torch.float64)
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        exact.large.weight.mul_(masks["large.weight"])
    found = []
    for call in (bank, lambda x: bank(x, domains=["photo"] * 2)):
        inputs = x.float().requires_grad_()
        call(inputs).sum().backward()
        found.append(inputs.grad)
    inputs = x.clone().requires_grad_()
    exact(inputs).sum().backward()
    for grad in found:
        torch.testing.assert_close(grad.double(), inputs.grad, rtol=1e-4, atol=1e-4)


def test_missing_classes_never_win() -> None:
    bank = _bank(own=True)
    x, domains = torch.randn(4, 3, 9, 9), list(DOMAINS)
    y = bank(x, domains=domains)
    assert y.shape == (4, 7)
    assert y.argmax(1)[2] < 2
    assert y.softmax(1)[2, 2:].eq(0).all()


def test_domains_by_number_are_those_by_name() -> None:
    bank = _bank(own=True)
    x = torch.randn(5, 3, 9, 9)
    served = bank.serve(["sketch", "photo"])
    y = served(x, ids=torch.tensor([1, 0, 0, 1, 0]))
    assert torch.equal(y, bank(x, domains=["photo", "sketch", "sketch", "photo", "sketch"])[:, : y.shape[1]])
    with pytest.raises(ValueError, match=r"ids lie in \[0, 2\]; expected 0 to 1"):
        served(x, ids=torch.tensor([0, 0, 2, 0, 0]))
    with pytest.raises(ValueError, match="expected int64"):
        served(x, ids=torch.zeros(5))


def test_the_result_does_not_depend_on_other_samples_in_the_batch() -> None:
    bank = _bank(own=True)
    x = torch.randn(6, 3, 9, 9)
    first = bank(x, domains=["art", "photo", "art", "sketch", "sketch", "art"])
    x[[1, 3, 4]] = torch.randn(3, 3, 9, 9)
    second = bank(x, domains=["art", "cartoon", "art", "photo", "cartoon", "art"])
    assert torch.equal(first[[0, 2, 5]], second[[0, 2, 5]])


class _Transformer(nn.Module):
    """torch's own layer, which reads its children's weights instead of calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(x).mean(1))


class _Folding(nn.Module):
    """Folds tokens into the batch before its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv1(x.reshape(-1, 8))).reshape(x.shape).sum(1)


class _Peeking(nn.Module):
    """Reads a masked weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x).sum(1) + self.conv1.weight.sum(0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_Transformer, "block.linear1.weight"),
        (_Transformer, "block.self_attn.in_proj_weight"),
        (_Folding, "conv1.weight"),
        (_Peeking, "conv1.weight"),
    ],
)
def test_networks_that_cannot_be_served_layer_by_layer_are_still_right(make: type[nn.Module], name: str) -> None:
    torch.manual_seed(0)
    net = make().eval()
    bank = MaskBank(net)
    for i, domain in enumerate(DOMAINS):
        bank.add(domain, nets.masks_for(net, i, names=(name,)))
    domains = ["art", "photo", "art", "sketch", "photo", "art"]
    x = torch.randn(6, 5, 8)
    with torch.no_grad():
        _assert_equals_loop(bank, x, domains)
        _assert_equals_loop(bank, x, domains)
    assert not bank.serve(sorted(set(domains))).layerwise


def test_a_call_goes_on_where_another_thread_finds_meanwhile_that_layers_cannot_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net = _Folding().eval()
    bank = MaskBank(net)
    for i, domain in enumerate(DOMAINS):
        bank.add(domain, nets.masks_for(net, i, names=("conv1.weight",)))
    served, x, ids = bank.serve(DOMAINS), torch.randn(6, 5, 8), torch.tensor([0, 1, 0, 2, 1, 0])
    real = type(served)._check_range

    def meanwhile(self: object, rows: Tensor) -> None:
        served._twin = None
        real(served, rows)

    monkeypatch.setattr(type(served), "_check_range", meanwhile)
    with torch.no_grad():
        y = served(x, ids=ids)
        for i, domain in enumerate(DOMAINS):
            bank.activate(domain)
            assert torch.equal(y[ids == i], bank(x[ids == i]))


def test_tokens_have_the_domain_of_their_sample() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    bank = MaskBank(net)
    for i, domain in enumerate(DOMAINS):
        head = {"2.weight": torch.randn(3 + i, 6), "2.bias": torch.randn(3 + i)}
        bank.add(domain, nets.masks_for(net, i, names=("0.weight",)), state=head)
    x, domains = torch.randn(4, 7, 8), ["sketch", "art", "art", "photo"]
    y = bank(x, domains=domains)
    assert y.shape == (4, 7, 6)
    for i, domain in enumerate(domains):
        bank.activate(domain)
        expected = bank(x[i : i + 1])[0]
        torch.testing.assert_close(y[i, :, : expected.shape[1]], expected)
        assert (y[i, :, expected.shape[1] :] == -torch.inf).all()


def test_structured_outputs_and_keyword_inputs_are_split_and_joined() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            y = self.conv1(x) * scale[:, None]
            return {"y": y, "twice": 2 * y}

    torch.manual_seed(0)
    bank = MaskBank(Net())
    for i, domain in enumerate(DOMAINS):
        bank.add(domain, nets.masks_for(bank.backbone, i, names=("conv1.weight",)))
    x, scale = torch.randn(3, 4), torch.rand(3)
    y = bank(x, scale=scale, domains=["art", "photo", "art"])
    bank.activate("photo")
    expected = bank(x[1:2], scale=scale[1:2])
    torch.testing.assert_close(y["y"][1:2], expected["y"])
    torch.testing.assert_close(y["twice"], 2 * y["y"])


def test_autocast_is_respected() -> None:
    bank = _bank(own=True)
    x, domains = torch.randn(4, 3, 9, 9), list(DOMAINS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bank(x, domains=domains)
    assert y.dtype == torch.bfloat16
    exact = bank(x, domains=domains)
    seen = exact.isfinite()
    torch.testing.assert_close(y.float()[seen], exact[seen], rtol=0.1, atol=0.1)


class _Similarity(nn.Module):
    """Every sample against every other: (B, 6) -> (B, B)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y @ y.t()


class _Recurrent(nn.Module):
    """Sequence first: (T, B, 6) -> (T, B, 3), or its last step."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.rnn, self.fc, self.last = nn.GRU(6, 6), nn.Linear(6, 3), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.rnn(x)[0])
        return y[-1] if self.last else y


class _BatchStatistics(nn.Module):
    """Batch norm that keeps no statistics: each sample is measured against its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


@pytest.mark.parametrize("own", [False, True], ids=["layerwise", "one by one"])
@pytest.mark.parametrize("domains", ["aabb", "abba", "ab", "aaab", "abc"])
@pytest.mark.parametrize(
    "make",
    [_Similarity, lambda: _Recurrent(last=False), lambda: _Recurrent(last=True), _BatchStatistics],
    ids=["similarity", "sequence", "last", "statistics"],
)
def test_what_mixes_samples_is_refused(make: Callable[[], nn.Module], domains: str, own: bool) -> None:
    torch.manual_seed(0)
    net = make()
    bank = MaskBank(net)
    for name in "abc":
        masks = {"fc.weight": torch.rand(net.fc.weight.shape) < 0.5}
        if own:  # a form that layers do not serve: the domains run one after the other
            bank.add(name, masks, form="edit", values={"fc.weight": torch.zeros(net.fc.weight.numel())})
        else:
            bank.add(name, masks)
    x = torch.randn((len(domains), 3, 6) if isinstance(net, _Recurrent) else (len(domains), 6))
    if isinstance(net, _BatchStatistics) and min(map(domains.count, domains)) == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's own word on it
            bank(x, domains=list(domains))
        return
    with pytest.raises(InputError, match="a mixed batch cannot be split"):
        bank(x, domains=list(domains))


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"logits": y + torch.randn_like(y), "scale": torch.ones(())}


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_as_many_classes_as_samples_are_no_mixture(classes: int) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))
    bank = MaskBank(net)
    for name in "ab":
        bank.add(name, {"0": torch.rand(5, 6) < 0.5})
    for domains in ("aabb", "ab", "abb", "aabbb"):
        assert bank(torch.randn(len(domains), 6), domains=list(domains)).shape == (len(domains), classes)


def test_a_network_that_draws_random_numbers_is_served() -> None:
    bank = MaskBank(_Noisy())
    for name in "ab":
        bank.add(name, {"fc": torch.rand(4, 6) < 0.5})
    assert bank(torch.randn(4, 6), domains=list("abab"))["logits"].shape == (4, 4)
