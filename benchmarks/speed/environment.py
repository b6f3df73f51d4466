"""Where a run took place: the columns that every row of its results repeats, and the name of its files."""

from dataclasses import asdict, dataclass

import torch

from hivtp_hf.evaluation import run_environment


@dataclass(frozen=True)
class Environment(run_environment.RunEnvironment):
    """Machine and versions as `hivtp evaluate` names them, and what was run on them."""

    preset: str

    @property
    def stem(self) -> str:
        """The name of the run's files, without a suffix."""
        return f"{super().stem}_{self.preset}"


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
    return Environment(**asdict(run_environment.this_environment(device, dtype, commit)), preset=preset)
