"""What a run is of and where it takes place: the checkpoint, the code, machine, versions, commit."""

import datetime
import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..checkpoints import CheckpointSource

_PACKAGE = Path(__file__).parents[1]
# Beside the weights: what makes a model of them, and prompts.
_READ = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class RunEnvironment:
    """Where a run takes place.

    Attributes:
        date: on which it began.
        commit: of the code, with "-dirty" where files differ from it; "unknown" outside a clone.
        device: that the model runs on.
        cpu, cores, threads: the processor, the cores that this process may use, and the threads that torch uses.
        dtype: of the model.
        torch, transformers, hivtp_hf, python: versions.
    """

    date: str
    commit: str
    device: str
    cpu: str
    cores: int
    threads: int
    dtype: str
    torch: str
    transformers: str
    hivtp_hf: str
    python: str

    @property
    def stem(self) -> str:
        """For names of folders: date, device and versions."""
        # A version says which build it is after a "+", and the device says that as well.
        versions = f"torch{self.torch.partition('+')[0]}_transformers{self.transformers}"
        return f"{self.date}_{slug(self.device)}_{versions}"


def this_environment(device: torch.device, dtype: torch.dtype, commit: str | None = None) -> RunEnvironment:
    """The environment of this process.

    Args:
        device: that the model runs on.
        dtype: of its weights.
        commit: of the code, for copies without a git folder; asked of git otherwise.
    """
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return RunEnvironment(
        date=datetime.date.today().isoformat(),
        commit=commit or _commit(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {cpu}, {cores} cores",
        cpu=cpu,
        cores=cores,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
        hivtp_hf=__version__,
        python=platform.python_version(),
    )


def slug(text: str) -> str:
    """`text` in lower case, with hyphens for all that is no letter, digit or dot."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def code_sha256() -> str:
    """Of the package's own code: a run that goes on must not mix two versions of it."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


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
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {"name": source.folder.resolve().name, "sha256": digest.hexdigest()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    # An installed copy may lie in a repository that is not ours.
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top, "src", _PACKAGE.name).resolve() != _PACKAGE.resolve():
        return "unknown"
    return _git("describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
