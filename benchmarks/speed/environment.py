"""Where a run took place: the columns that every row of its results repeats, and the name of its files."""

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """Machine, versions, and what was run on them."""

    date: str
    commit: str
    preset: str
    device: str
    cpu: str
    cores: int
    threads: int
    dtype: str
    torch: str
    transformers: str
    python: str

    @property
    def stem(self) -> str:
        """The name of the run's files, without a suffix."""
        # A version says which build it is after a "+", and the device says that as well.
        versions = f"torch{self.torch.partition('+')[0]}_transformers{self.transformers}"
        return f"{self.date}_{_slug(self.device)}_{versions}_{self.preset}"


def find_device(name: str, preset: str) -> torch.device:
    """The device called `name`; a ValueError where it is missing or unknown."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"`--device` is {name!r}; it must be 'cpu', 'cuda' or 'cuda:' and a number.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"the preset {preset!r} was to run on {name!r}, but torch {torch.__version__} sees {count} CUDA devices on "
                "this machine. Nothing was measured. Run it where there is one, or use `--preset cpu` where there is none."
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def this_environment(device: torch.device, dtype: torch.dtype, preset: str, commit: str | None = None) -> Environment:
    """The environment of this process.

    Args:
        device: that models run on.
        dtype: of their weights.
        preset: its name.
        commit: of the code, for copies without a git folder; asked of git otherwise.
    """
    cpu, cores = _cpu_name(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        date=datetime.date.today().isoformat(),
        commit=commit or _commit(),
        preset=preset,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {cpu}, {cores} cores",
        cpu=cpu,
        cores=cores,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


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
    """The short name of the commit, with "-dirty" where files differ from it; "unknown" outside git."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() if described.returncode == 0 and described.stdout.strip() else "unknown"
