"""Where a run took place: the columns that every row of its results repeats, and the name of its files."""

from dataclasses import asdict, dataclass

import torch

from hivtp_hf.evaluation import environment as run_environment


@dataclass(frozen=True)
class Environment(run_environment.RunEnvironment):
    """Machine and versions as `hivtp evaluate` names them, and what was run on them."""

    preset: str

    @property
    def stem(self) -> str:
        """The name of the run's files, without a suffix."""
        return f"{super().stem}_{self.preset}"


def this_environment(device: torch.device, dtype: torch.dtype, preset: str, commit: str | None = None) -> Environment:
    """The environment of this process.

    Args:
        device: that models run on.
        dtype: of their weights.
        preset: its name.
        commit: of the code, for copies without a git folder; asked of git otherwise.
    """
    return Environment(**asdict(run_environment.this_environment(device, dtype, commit)), preset=preset)
