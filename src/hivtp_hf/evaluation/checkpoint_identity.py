"""Which checkpoint was evaluated: its commit on the Hub, or what its files hold."""

import hashlib
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointSource

# Beside the weights: what makes a model of them, and prompts.
_READ = ("*.json", "*.jinja", "*.model", "*.txt")


def checkpoint_identity(source: CheckpointSource) -> dict[str, Any]:
    """What tells a checkpoint from others, as JSON types: its name with a commit, or with a sum over the files of a folder.

    Its weights must be downloaded by now. Folders are called by their last name: where they lie is nobody's business.
    """
    if source.repository is not None:
        identity = {"name": source.name, "revision": source.repository.revision}
        return identity if source.base is None else {**identity, "weights_of": source.base.to_dict()}
    weights = source.weight_files()
    files = sorted({*weights, *(path for pattern in _READ for path in source.folder.glob(pattern) if path.is_file())})
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + _sha256(path))
    return {"name": source.folder.resolve().name, "sha256": digest.hexdigest()}


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.digest()
