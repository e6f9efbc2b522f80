"""MaskAdapter: one domain's mask beside the name of its base model, as a folder such as adapters are kept in.

The folder holds `mask_config.json`, a model card `README.md`, and a bank of one domain: `<domain>.safetensors` and its
index. So it also loads as a bank.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwm_fast._files import reason, write_atomic
from dwm_fast.bank import hub
from dwm_fast.bank.atomic import read_small
from dwm_fast.bank.backbone import Backbone
from dwm_fast.bank.bank import MaskBank
from dwm_fast.bank.folder import load_domain, place_of
from dwm_fast.bank.header import fail, parse_object
from dwm_fast.bank.hub import CARD, CONFIG
from dwm_fast.bank.record import DomainMasks, check_domain_name
from dwm_fast.bank.runner import domain_tensors
from dwm_fast.bank.save import save_entries
from dwm_fast.errors import InputError, MaskFileError
from dwm_fast.nn.shell import Shell, aliases, unwrapped

_FORMAT, _VERSION = "dwm-fast-adapter", 1
_BASE = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
"""How the Hub names a model; what else a base is called (a folder) is no link in a card."""


@dataclass(frozen=True, eq=False)
class MaskAdapter:
    """One domain of a base model, to be kept, shared and applied.

    Attributes:
        record: the masks and the tensors that the domain has for itself; `MaskBank.add_record` takes it.
        base_model_name_or_path: where the base model comes from, as transformers and PEFT call it; "" when unknown. It
            is a note to people: whether a model is the right one is told by the fingerprint of its weights.
        base_model_class: the class of the network.

    Example:
        >>> import torch, dwm_fast as dwm, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masked = dwm.mask_model(model, dwm.GumbelSigmoid(init=0.0), seed=0)
        >>> folder = tempfile.mkdtemp()
        >>> dwm.MaskAdapter.from_masked(masked, model, "sketch").save_pretrained(folder)
        >>> pruned = dwm.MaskAdapter.from_pretrained(folder).apply(model)
        >>> torch.equal(pruned(torch.ones(1, 4)), masked.eval()(torch.ones(1, 4)))
        True
    """

    record: DomainMasks
    base_model_name_or_path: str = ""
    base_model_class: str = ""

    @classmethod
    def from_masked(
        cls, masked: Any, model: nn.Module, domain: str = "default", *, base_model_name_or_path: str | None = None
    ) -> MaskAdapter:
        """The adapter of a masked model.

        Args:
            masked: what `mask_model` returned for `model`, or bool keep masks by name, as `MaskBank.add` takes them.
            model: the plain network; tensors in which `masked` differs from it (a head, batch norms) are the domain's.
            domain: the mask's name.
            base_model_name_or_path: by default what transformers or timm noted in the model.

        Raises:
            InputError: the masks were learned over other weights than the model's, or the name cannot be one.
        """
        model = unwrapped(model)
        bank = MaskBank(model, memory_budget=0)
        bank.add(domain, masked)
        base = _base_of(model) if base_model_name_or_path is None else base_model_name_or_path
        return cls(bank.record(domain), base, type(model).__name__)

    @property
    def domain(self) -> str:
        """The mask's name."""
        return self.record.info.domain

    def config(self) -> dict[str, Any]:
        """What `mask_config.json` holds: plain data."""
        info = self.record.info
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_model_class": self.base_model_class,
            "domain": info.domain,
            "mask_type": info.method,
            "form": info.form,
            "masked_layers": list(info.layout.names),
            "modules_to_save": sorted(self.record.state),
            "fraction_kept": round(info.fraction_kept, 6),
        }

    def save_pretrained(self, folder: str | os.PathLike[str], *, coding: str = "raw") -> None:
        """Write the folder: config, model card, masks. A card that is there already stays, and so do other domains.

        Raises:
            MaskFileError: the folder cannot be written.
        """
        place = place_of(folder)
        save_entries(place, {self.domain: (None, self.record)}, (), coding, None)
        write_atomic(place / CONFIG, json.dumps(self.config(), indent=1) + "\n", MaskFileError)
        if not os.path.lexists(place / CARD):
            write_atomic(place / CARD, self.card(), MaskFileError)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> MaskAdapter:
        """Read an adapter from a folder, or from a Hugging Face Hub repository.

        Raises:
            MaskFileError: the folder is none of an adapter, its files are broken, or contradict one another.
            BackendUnavailable: there is no such folder, and the package huggingface_hub is missing.
        """
        folder = Path(source)
        folder = place_of(folder if folder.is_dir() else hub.download(str(source), revision))
        path = folder / CONFIG
        try:
            config = parse_object(path, "config", read_small(path))
        except OSError as error:
            raise MaskFileError(f"{path}: cannot be read: {reason(error)}; expected a folder of MaskAdapter") from error
        domain = _checked(path, config)
        record = load_domain(folder, domain)
        adapter = cls(record, config["base_model_name_or_path"], config["base_model_class"])
        wrong = [key for key, value in adapter.config().items() if config.get(key) != value]
        if wrong:
            fail(path, wrong[0], f"is not what {domain}.safetensors holds; save the adapter again")
        return adapter

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, coding: str = "raw", message: str = "Update mask"
    ) -> str:
        """Upload the folder to a Hugging Face Hub repository, made if it is missing; returns the commit's URL."""
        return hub.upload(
            lambda folder: self.save_pretrained(folder, coding=coding), repo_id, private=private, message=message
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, model: nn.Module, *, allow_other_backbone: bool = False) -> nn.Module:
        """A copy of `model`, of its class, with the mask baked into the weights; it shares no storage with it.

        Args:
            model: the base model, as it was masked.
            allow_other_backbone: apply the mask to other weights than it was learned over.

        Raises:
            MaskFileError: the model has no such weights, or they are others.
        """
        network = Backbone(unwrapped(model))
        network.check_fit(self.record, f"adapter '{self.domain}'")
        if not allow_other_backbone:
            network.check_fingerprint(self.record, f"adapter '{self.domain}'")
        shell, names = Shell(network.model, shared=()), aliases(network.model)
        for name, tensor in domain_tensors(self.record, network.tensors).items():
            old = network.tensors[name]
            tensor = tensor.clone() if name in self.record.state else tensor
            new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            for alias in names[name]:
                shell.set(alias, new)
                _resize(shell.module.get_submodule(alias.rpartition(".")[0]))
        return shell.module

    def card(self) -> str:
        """The model card: what the mask is, over which model, and the code that applies it."""
        info, base = self.record.info, self.base_model_name_or_path
        front = ["library_name: dwm-fast", "tags:", "- dwm-fast", "- weight-mask"]
        if _BASE.fullmatch(base):
            front.insert(0, f"base_model: {json.dumps(base)}")
        weights, count = sum(info.layout.numels), len(info.layout.names)
        over = f"`{base}`" if _BASE.fullmatch(base) else "its base model"
        return "\n".join(
            [
                "---",
                *front,
                "---",
                f"# {info.domain}: a weight mask over {over}",
                "",
                f"One bit for each of {weights:,} weights in {count} {'layer' if count == 1 else 'layers'} of a "
                f"{_plain(self.base_model_class) or 'network'}; {100 * info.fraction_kept:.1f} % of them are kept.",
                "",
                "```python",
                "import dwm_fast as dwm",
                "",
                'model = dwm.MaskAdapter.from_pretrained("<this repository or folder>").apply(base_model)',
                "```",
                "",
                "The weights themselves are the base model's and are not in here.",
                "",
            ]
        )


def _base_of(model: nn.Module) -> str:
    """Where transformers or timm say that a model comes from; "" when they say nothing."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    card = getattr(model, "pretrained_cfg", None)
    if not name and isinstance(card, Mapping):
        name = card.get("hf_hub_id")
    return name if isinstance(name, str) else ""


def _plain(text: str) -> str:
    """A class name for a card; "" for what is none."""
    return text if text.isidentifier() else ""


def _resize(module: nn.Module) -> None:
    """Let a linear layer say the size of the head that it was given."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _checked(path: Path, config: Mapping[str, Any]) -> str:
    """The domain that a config names; MaskFileError for what is no config of ours."""
    if config.get("format") != _FORMAT or config.get("version") != _VERSION:
        fail(path, "version", f"expected format '{_FORMAT}', version {_VERSION}")
    for key in ("base_model_name_or_path", "base_model_class"):
        if not isinstance(config.get(key), str):
            fail(path, key, "expected text")
    try:
        return check_domain_name(config.get("domain"))
    except InputError as error:
        raise MaskFileError(f"{path}: domain: {error}") from error
