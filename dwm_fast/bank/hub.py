"""Banks and adapters on the Hugging Face Hub; needs the optional package huggingface_hub."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwm_fast.errors import BackendUnavailable

CONFIG, CARD = "mask_config.json", "README.md"
_FILES = ("*.safetensors", "index.json", CONFIG, CARD)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise BackendUnavailable(
            "the Hub needs the package 'huggingface_hub'; type: pip install 'dwm-fast[hub]'"
        ) from error


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetch a Hub repository's mask files, index, config and card into the local cache; returns their folder."""
    return Path(_hub().snapshot_download(repo_id, revision=revision, allow_patterns=list(_FILES)))


def upload(save: Callable[[str], object], repo_id: str, *, private: bool | None, message: str) -> str:
    """Upload what `save` writes into a folder; returns the URL of the commit."""
    api = _hub().HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(_FILES), commit_message=message
        )
    return str(commit)
