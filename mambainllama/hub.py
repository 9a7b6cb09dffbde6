"""From the name of a model to a folder here: a path, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ArgumentError, FileError, NotFoundError, shorten

__all__ = ["find_folder"]

# Weights as safetensors, and the small files beside them; not the other formats that repositories
# also hold.
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*",
]
_UNWANTED = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_folder(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a model, downloaded where `name` is a Hub id.

    Parameters
    ----------
    name
        A folder (which comes first), or "owner/name" of a Hub repository.
    revision
        Branch, tag or commit of the repository.

    Raises
    ------
    NotFoundError
        There is no such folder and no such repository.
    FileError
        The repository cannot be downloaded: no network, no access, a full disk.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ArgumentError(f"load: expected a folder or a Hub id, got {type(name).__name__}")
    text = os.fspath(name)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"load: expected a folder or a Hub id, got {shorten(text)}")
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise ArgumentError(
            f"{path}: is a file; give the folder that holds config.json and the weights"
        )
    if isinstance(name, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise NotFoundError(
            f"{path}: no such folder (and not the name of a Hub repository, which is owner/name)"
        )
    return _download(text, revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except errors.GatedRepoError:
        reason = (
            "its owner must grant you access; accept the terms on its page, "
            "then run `hf auth login` or set HF_TOKEN"
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise NotFoundError(
            f"{repository}: no such folder here, and no such {what} on the Hub (or it is private); "
            "check the spelling"
        ) from None
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the cache and the Hub cannot be reached; check the network"
    except Exception as error:  # requests, httpx, OSError: many kinds, one meaning
        reason = shorten(f"{type(error).__name__}: {error}", 200)
    raise FileError(
        f"{repository}: no such folder here, and the Hub repository cannot be downloaded: {reason}"
    )
