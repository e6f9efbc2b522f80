"""A masked model looks like its network to code that inspects it, and `generate` runs under one mask sample."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwm_fast as dwm
from dwm_fast.errors import InputError
from dwm_fast.nn.shell import unwrapped

pytestmark = pytest.mark.usefixtures("reference")


class Writer(nn.Module):
    """A small model of language in the style of transformers, with a host (`mix`) beside its linear layers."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=2)
        self.generation_config = SimpleNamespace(steps=6)
        self.kind, self.mask_samples, self.tau = "writer", "its own", "a word"  # names that masked models have too
        self.scale = nn.Parameter(torch.ones(()))
        self.table, self.mix, self.head = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 20)
        self.checkpointing = False
        self.seen: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(
        self, input_ids: Tensor, /, attention_mask: Tensor | None = None, *, labels: Tensor | None = None
    ) -> Any:
        """Scores of the next token."""
        self.seen.append(self.head(torch.ones(8)).detach())  # tells which mask is in force
        return self.scale * self.head(self.mix(self.table(input_ids))[0])

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def generate(self, input_ids: Tensor, *, fail: bool = False) -> Tensor:
        for _ in range(self.generation_config.steps):
            input_ids = torch.cat([input_ids, self(input_ids)[:, -1:].argmax(-1)], 1)
            if fail:
                raise KeyError("stop")
        return input_ids

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError("weights without masks were written")


IDS = torch.arange(6).view(2, 3)


def _masked(**settings: Any) -> Any:
    torch.manual_seed(0)
    exclude = ["mix", "mix.*"] if settings.get("memory") == "streamed" else []
    masked = dwm.mask_model(Writer(), dwm.GumbelSigmoid(init=0.0), seed=3, exclude=exclude, **settings)
    with torch.no_grad():
        for number, logits in enumerate(masked.mask_parameters()):
            logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(number)))
    return masked


MEMORIES = pytest.mark.parametrize("memory", ["plain", "streamed"])


# --- signature


@MEMORIES
def test_forward_has_the_signature_of_the_network_on_the_object_and_on_its_class(memory):
    masked = _masked(memory=memory)
    assert inspect.signature(masked.forward) == inspect.signature(Writer().forward)
    assert inspect.signature(type(masked).forward) == inspect.signature(Writer.forward)
    assert inspect.getfullargspec(masked.forward).kwonlyargs == ["labels"]
    assert masked.forward.__doc__ == "Scores of the next token."
    assert type(masked).__name__ == f"{'Masked' if memory == 'plain' else 'Streamed'}Model[Writer]"
    assert masked._get_name() == "Writer"
    assert repr(masked).startswith(f"{type(masked).__name__}(")


def test_masked_models_of_other_networks_keep_their_own_signatures():
    linear = dwm.mask_model(nn.Linear(2, 2), dwm.Threshold())
    rnn = dwm.mask_model(nn.LSTM(2, 2), dwm.Threshold())
    assert list(inspect.signature(linear.forward).parameters) == ["input"]
    assert list(inspect.signature(rnn.forward).parameters) == ["input", "hx"]
    assert list(inspect.signature(_masked().forward).parameters) == ["input_ids", "attention_mask", "labels"]
    assert list(inspect.signature(dwm.MaskedModel.forward).parameters) == ["self", "args", "kwargs"]


def test_a_forward_of_the_one_network_decides_and_one_without_a_signature_leaves_it_open():
    net: Any = nn.Sequential(nn.Linear(2, 2))
    net.forward = lambda pixels: pixels
    masked = dwm.mask_model(net, dwm.Threshold())
    assert list(inspect.signature(masked.forward).parameters) == ["pixels"]
    again = copy.deepcopy(masked)
    assert list(inspect.signature(again.forward).parameters) == ["pixels"]
    net.forward = lambda self: self  # two parameters of one name cannot be written down
    assert list(inspect.signature(dwm.mask_model(net, dwm.Threshold()).forward).parameters) == ["args", "kwargs"]


@MEMORIES
def test_it_is_a_masked_model_as_before(memory):
    masked = _masked(memory=memory)
    assert isinstance(masked, dwm.MaskedModel)
    assert issubclass(type(masked), dwm.MaskedModel)
    assert unwrapped(torch.compile(masked)) is masked
    names = {n.removeprefix("model.") for n, _ in masked.named_parameters() if "logits" not in n}
    assert names == {n for n, _ in Writer().named_parameters()}
    assert {n.partition(".")[0] for n in masked.state_dict()} == {"rng_state", "tau", "model"}
    assert (masked.kind.name, masked.mask_samples, masked.tau.shape) == ("gumbel-sigmoid", 1, ())
    assert (masked.model.kind, masked.model.mask_samples, masked.model.tau) == ("writer", "its own", "a word")


def test_a_subclass_with_a_forward_of_its_own_is_left_as_it_is():
    class Loud(dwm.MaskedModel):
        def forward(self, x: Tensor, loud: bool = False) -> Tensor:
            return super().forward(x) * (2 if loud else 1)

    inner = nn.Sequential(dwm.MaskedLinear(2, 2))
    loud = Loud(inner)
    assert type(loud) is Loud
    assert list(inspect.signature(loud.forward).parameters) == ["x", "loud"]
    assert type(copy.deepcopy(loud)) is Loud


# --- copies


@MEMORIES
def test_pickles_and_copies_are_of_the_same_class_with_the_same_output(memory):
    masked = _masked(memory=memory).eval()
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(masked)),
        copy.deepcopy(masked),
        copy.copy(masked),
        torch.load(file, weights_only=False),
    ]
    for twin in copies:
        assert type(twin) is type(masked)
        assert torch.equal(twin(IDS), masked(IDS))
        assert torch.equal(twin.generate(IDS), masked.generate(IDS))


def test_an_object_without_state_ends_every_look_up():
    empty = dwm.MaskedModel.__new__(dwm.MaskedModel)
    for name in ("config", "_modules", "model", "__deepcopy__"):
        assert not hasattr(empty, name)


def test_a_pickle_of_an_older_release_is_read():
    masked = _masked().eval()
    state = {k: v for k, v in masked.__getstate__().items() if k != "_held"}
    old = dwm.MaskedModel.__new__(dwm.MaskedModel)
    old.__setstate__(state)
    assert type(old) is type(masked)
    assert torch.equal(old(IDS), masked(IDS))


# --- attributes


def test_public_attributes_are_read_from_the_network_and_set_there():
    masked = _masked()
    assert masked.config is masked.model.config
    assert (masked.device, masked.main_input_name) == (torch.device("cpu"), "input_ids")
    assert masked.head is masked.model.head
    masked.gradient_checkpointing_enable()
    assert masked.model.checkpointing
    masked.generation_config = SimpleNamespace(steps=1)
    assert masked.model.generation_config.steps == 1
    assert masked.generate(IDS).shape == (2, 4)
    masked.noted = 5  # a name that neither has
    assert masked.noted == 5
    assert not hasattr(masked.model, "noted")


@pytest.mark.parametrize("name", ["seen_by", "from_pretrained"])
def test_a_missing_name_is_an_error_in_the_words_of_the_network(name):
    masked = _masked()
    assert not hasattr(masked, name)
    with pytest.raises(AttributeError, match=f"^'Writer' object has no attribute '{name}'; nor has the masked model"):
        getattr(masked, name)


def test_private_names_are_never_the_networks():
    masked = _masked()
    masked.model._secret = 1
    assert not hasattr(masked, "_secret")
    masked._secret = 2
    assert masked.model._secret == 1


def test_what_would_go_past_the_masks_is_refused_with_advice():
    masked = _masked()
    with pytest.raises(AttributeError, match=r"read as masked\.model\.scale.*dwm_fast\.merge"):
        _ = masked.scale
    lstm: Any = dwm.mask_model(nn.LSTM(2, 2), dwm.Threshold())
    with pytest.raises(AttributeError, match=r"masked\.model\.weight_ih_l0"):
        _ = lstm.weight_ih_l0
    with pytest.raises(AttributeError, match=r"merge\(masked\)\.save_pretrained"):
        masked.save_pretrained("there")
    for part, x in ((masked.head, torch.ones(1, 8)), (masked.mix, torch.ones(1, 1, 8))):
        with pytest.raises(InputError, match="call the masked model"):
            part(x)


# --- generate


@MEMORIES
def test_generate_in_eval_gives_what_the_merged_network_generates(memory):
    masked = _masked(memory=memory).eval()
    merged: Any = dwm.merge(masked)
    assert torch.equal(masked.generate(IDS), merged.generate(IDS))
    assert not torch.equal(masked.generate(IDS), _unmasked().generate(IDS))
    assert list(inspect.signature(masked.generate).parameters) == ["input_ids", "fail"]


def _unmasked() -> Writer:
    torch.manual_seed(0)
    return Writer()


def test_generate_in_train_uses_the_one_mask_of_the_next_call_and_leaves_the_noise():
    masked = _masked(mask_samples=2).train()
    masked(IDS)
    masked.model.seen.clear()
    state = masked.rng_state.clone()
    assert torch.equal(masked.generate(IDS), masked.generate(IDS))
    assert torch.equal(masked.rng_state, state)
    held = list(masked.model.seen)
    assert len(held) == 12
    masked.model.seen.clear()
    masked(IDS)
    assert all(torch.equal(weight, masked.model.seen[0]) for weight in held)
    assert not torch.equal(*masked.model.seen)


def test_generate_leaves_the_penalty_of_the_last_call():
    masked, twin = _masked().train(), _masked().train()
    for model in (masked, twin):
        model(IDS)
    masked.generate(IDS)
    assert masked._drawn is not None
    assert torch.equal(masked.sparsity_penalty(), twin.sparsity_penalty())


def test_streamed_generation_in_train_draws_needs_no_optimizer_and_learns_nothing():
    masked = _masked(memory="streamed").train()
    before = [p.detach().clone() for p in masked.mask_parameters()]
    drawn = masked.generate(IDS)
    assert torch.equal(drawn, masked.generate(IDS))
    assert masked.rng_state.tolist() == [3, 0]
    assert all(map(torch.equal, before, masked.mask_parameters()))


@MEMORIES
@pytest.mark.parametrize("training", [True, False])
def test_no_mask_is_left_in_force_after_generate_even_when_it_fails(memory, training):
    masked = _masked(memory=memory).train(training)
    with pytest.raises(KeyError, match="stop"):
        masked.generate(IDS, fail=True)
    assert all(vars(layer)["_staged"] is None for layer in masked.mask_layers().values())
    assert all(getattr(layer, "_run", None) is None for layer in masked.mask_layers().values())
    assert masked._held is None


def test_a_call_of_the_masked_model_within_generate_leaves_the_rest_its_mask():
    class Asks(Writer):
        def generate(self, input_ids: Tensor, *, fail: bool = False) -> Tensor:
            first = self(input_ids)
            holder[0].rng_state[1] += 1
            other = holder[0](input_ids)
            assert not torch.equal(other, first)
            assert torch.equal(self(input_ids), first)
            return first

    torch.manual_seed(0)
    holder = [dwm.mask_model(Asks(), dwm.GumbelSigmoid(init=0.0), seed=3).train()]
    holder[0].generate(IDS)  # type: ignore[operator]


def test_a_layer_that_was_replaced_is_noticed_by_generate():
    masked = _masked().eval()
    masked.head = nn.Linear(8, 20)
    with pytest.raises(InputError, match="masked layers were replaced"):
        masked.generate(IDS)


# --- torch.compile


def test_a_compiled_masked_model_of_a_network_with_attributes_is_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.factor = SimpleNamespace(width=4), 3.0
            self.body = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, *, twice: bool = False) -> Tensor:
            hidden = self.body(hidden) * self.factor
            return 2 * hidden if twice else hidden

    masked = dwm.mask_model(Small(), dwm.GumbelSigmoid(init=0.0), seed=1).train()
    twin = copy.deepcopy(masked)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4)
    for twice in (False, True):
        assert torch.equal(compiled(x, twice=twice), twin(x, twice=twice))
    assert torch.equal(compiled(hidden=x), twin(hidden=x))
    torch.compiler.reset()
