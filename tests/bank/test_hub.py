"""The Hub: what is uploaded is a bank's folder, and what is fetched loads as one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dwm_fast.bank import MaskBank
from dwm_fast.errors import BackendUnavailable

from . import nets


class _Hub:
    """Stands in for the package huggingface_hub; repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.HfApi = lambda: self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> SimpleNamespace:
        for pattern in allow_patterns:
            for path in Path(folder_path).glob(pattern):
                shutil.copy(path, self.root / repo_id)
        return SimpleNamespace(message=commit_message)

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "index.json" in allow_patterns
        return str(self.root / repo_id)


def test_a_bank_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path))
    net = nets.small_net()
    bank = MaskBank(net)
    bank.add("sketch", nets.masks_for(net, 1), state=nets.state_for(net, 1, 7))
    bank.push_to_hub("me/masks", private=True, coding="coded")
    assert {p.name for p in (tmp_path / "me/masks").iterdir()} == {"sketch.safetensors", "index.json"}
    for source in ("me/masks", tmp_path / "me/masks"):
        loaded = MaskBank.from_pretrained(source, net)
        assert torch.equal(loaded.record("sketch").bits, bank.record("sketch").bits)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'dwm-fast\[hub\]'"):
        MaskBank.from_pretrained("me/masks", nets.small_net())
