"""A study's masks as a bank: every source under its own bits, over the network that all of them started from."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from dwm_fast.bank import MaskBank
from dwm_fast.bank.adopt import weight_names
from dwm_fast.errors import InputError
from dwm_fast.pacs.backbones import last_linear
from dwm_fast.pacs.config import builtin_defaults, load_config
from dwm_fast.pacs.pairs.lab import PairLab
from dwm_fast.pacs.study import Study

BACKBONE = "backbone.safetensors"


def bank_of(run: Path, method: str, seed: int) -> MaskBank:
    """The bank of a finished study of pairs.

    The sources' networks differ, so a domain is of the form "kept": its bits, the weights of its network that they
    keep, and whatever of that network has no mask. Under it the bank computes what the study's view "masked" does where
    kept weights are frozen.

    Args:
        run: the study's run folder.
        method, seed: of which masks.

    Raises:
        InputError: no finished study of pairs is there, or it has no such masks, or one mask for each pair.
    """
    if not (run / "config.json").is_file():
        raise InputError(f"{run} has no config.json; expected the run folder of a finished study (dwm-fast pacs --out)")
    config = load_config(run / "config.json", builtin_defaults())
    study = Study(config, run)
    lab = study.lab
    if not isinstance(lab, PairLab):
        raise InputError(f"{run} holds a sequence; its bank is in its own folder already. Expected a study of pairs")
    if method not in config.methods or method == "none" or lab.seen(method, config.targets[0]) is not None:
        masking = [name for name in config.methods if name != "none" and lab.seen(name, config.targets[0]) is None]
        raise InputError(f"method '{method}' has no mask for each source there; expected one of {', '.join(masking)}")
    if seed not in config.seeds:
        raise InputError(f"seed {seed} is not in the study; expected one of {', '.join(map(str, config.seeds))}")
    sources = list(dict.fromkeys(source for source, _ in config.pairs()))
    for planned in (p for s in sources for p in (lab.source_stage(s, seed), lab.mask_stage(s, method, seed))):
        if not lab.stages.check(*planned):
            raise InputError(f"stage {planned[0]} is not done in {run}; run the study to its end first")
    apart = len({study.data.classes_of(source) for source in sources}) > 1
    head = last_linear(lab.network()) if apart else ""  # of different widths, so each is a domain's own, masked already
    bank = MaskBank(lab.network(lab.source(sources[0], seed).start, lab.classes(sources[0])))
    for source in sources:
        found = lab.mask(source, method, seed).found
        trained = lab.network(lab.source(source, seed).end, lab.classes(source))
        assert found.keep is not None
        masks = weight_names(found.keep, trained.state_dict())
        keep = {name: mask for name, mask in masks.items() if not name.startswith(f"{head}.")}
        own = MaskBank(trained)
        state = {name: value for name, value in trained.state_dict().items() if name not in keep}
        state |= {name: state[name] * masks[name].to(study.device) for name in masks if name not in keep}
        own.add(source, keep, form="kept", state=state, method=method, classes=study.data.classes_of(source))
        bank.add_record(own.record(source))
    return bank


def save_bank(run: Path, out: Path, method: str, seed: int) -> str:
    """Write `bank_of` a study to `out`, with the network in `out`/backbone.safetensors; what was written, in words."""
    bank = bank_of(run, method, seed)
    bank.save(out)
    save_file({name: value.contiguous() for name, value in bank.backbone.state_dict().items()}, out / BACKBONE)
    return f"{len(bank)} domains in {out}: {', '.join(bank.domains)}; their network in {out / BACKBONE}"
