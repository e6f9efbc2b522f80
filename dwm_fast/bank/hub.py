"""Banks on the Hugging Face Hub; needs the optional package huggingface_hub."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwm_fast.errors import BackendUnavailable

if TYPE_CHECKING:
    from dwm_fast.bank.bank import MaskBank

_FILES = ("*.safetensors", "index.json")


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise BackendUnavailable(
            "the Hub needs the package 'huggingface_hub'; type: pip install 'dwm-fast[hub]'"
        ) from error


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetch the mask files and index of a Hub repository into the local cache; returns their folder."""
    return Path(_hub().snapshot_download(repo_id, revision=revision, allow_patterns=list(_FILES)))


def upload(bank: MaskBank, repo_id: str, *, private: bool | None, coding: str, message: str) -> str:
    """Save a bank to a temporary folder and upload it; returns the URL of the commit."""
    api = _hub().HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder, coding=coding)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(_FILES), commit_message=message
        )
    return str(commit)
