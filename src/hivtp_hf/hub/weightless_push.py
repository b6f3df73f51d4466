"""A complete checkpoint pushed without its weights, where its base on the Hub has the same ones."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from ..base_checkpoint import BaseCheckpoint
from ..checkpoints.hub_refusals import explained_refusals, patiently
from ..checkpoints.repository_names import is_repository
from ..weightless_checkpoint import WEIGHT_NAMES
from .local_checkpoint import LocalCheckpoint
from .pushed_card import card_of

_CHUNK_BYTES = 16 * 2**20
_COMPLETE = "Push it without `--config-only` (config_only=False)"


def without_weights(checkpoint: LocalCheckpoint, api: HfApi) -> tuple[LocalCheckpoint, BaseCheckpoint]:
    """The checkpoint with the name of its base in place of its weights, and that base; its folder stays as it is.

    The base is the one that the model card names, at its newest commit.

    Raises:
        ValueError: where the card names no base on the Hub, or the weights are not those of the base.
        OSError, huggingface_hub.errors.HfHubHTTPError: where the base cannot be looked at.
    """
    name = _base_named_by_card(checkpoint)
    with explained_refusals(name):
        commit = patiently(lambda: api.model_info(name)).sha
        base = BaseCheckpoint(name, commit)
        wanted = [*WEIGHT_NAMES, *checkpoint.weights]
        entries = patiently(lambda: api.get_paths_info(name, wanted, revision=commit))
    _check_equal_weights(checkpoint, base, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})
    config = {**checkpoint.config, "base_model": base.to_dict()}
    files = {path: content for path, content in checkpoint.files.items() if path not in checkpoint.weights}
    files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return checkpoint._replace(files=files, config=config, weights=[], base=base), base


def is_same_file(path: Path, entry: RepoFile) -> bool:
    """Whether a file on the Hub has the bytes of one on disk; only the hash of the former is downloaded."""
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return _hash_of(path, hashlib.sha256()) == entry.lfs.sha256
    return _hash_of(path, hashlib.sha1(b"blob %d\0" % entry.size)) == entry.blob_id  # git's own


def _base_named_by_card(checkpoint: LocalCheckpoint) -> str:
    card = checkpoint.files.get("README.md")
    named = card_of(card).data.get("base_model") if card is not None else None
    names = named if isinstance(named, list) else [named]
    if len(names) != 1 or not is_repository(names[0]):
        raise ValueError(
            f"Which checkpoint on the Hub has the weights of {checkpoint.folder} is not known: `base_model` in the metadata of "
            f"README.md must name it. {_COMPLETE}, or write `base_model: owner/name` there."
        )
    return str(names[0])


def _check_equal_weights(checkpoint: LocalCheckpoint, base: BaseCheckpoint, entries: dict[str, RepoFile]) -> None:
    first = next((name for name in WEIGHT_NAMES if name in entries), None)
    if first != checkpoint.weights[0]:
        raise ValueError(
            f"{base} has other files of weights than {checkpoint.folder}: what loads there is {first or 'nothing'}, here "
            f"{checkpoint.weights[0]}. {_COMPLETE}."
        )
    for name in checkpoint.weights:
        if name not in entries or not is_same_file(checkpoint.folder / name, entries[name]):
            raise ValueError(
                f"{name} of {checkpoint.folder} is not the one of {base}: its weights were changed, or come from elsewhere. "
                f"{_COMPLETE}."
            )


def _hash_of(path: Path, algorithm: Any) -> str:
    with path.open("rb") as reading, _bar(path) as progress:
        while chunk := reading.read(_CHUNK_BYTES):
            algorithm.update(chunk)
            progress.update(len(chunk))
    return algorithm.hexdigest()


def _bar(path: Path) -> Any:
    return tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"Comparing {path.name}", leave=False)
