"""`run_folder`: the folder of a run, which is another's only where that was interrupted."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_whole
from .run_environment import RunEnvironment

CONFIG, ENVIRONMENT, PARTS = "config.json", "environment.json", "partial.jsonl"
METRICS, PREDICTIONS, PLOT = "metrics.csv", "predictions.csv", "accuracy.png"
# A run may go on tomorrow, and after a commit that leaves the package as it was; the code itself is in the configuration.
_MAY_DIFFER = ("date", "commit")


def check_output(output: Path) -> None:
    """A ValueError where no folder can be made."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"`--output` is {output}, but {path} is no folder; give another one.")


def run_folder(output: Path, what: str, config: Mapping[str, Any], environment: RunEnvironment) -> Path:
    """The folder of a run, with its configuration and environment.

    That is the folder of a run of the same configuration in the same environment that was not finished, which then goes on;
    else a new one, `<what>-<environment>`, or `<what>-<environment>-2` and so on where that exists. A finished run is never
    touched again.

    Args:
        output: where the folders of runs lie; made if it does not exist.
        what: what is evaluated, as part of a file name.
        config: all that decides what the run's results are, as JSON types.
        environment: of this process.
    """
    output.mkdir(parents=True, exist_ok=True)
    for folder in sorted(output.glob(f"{what}-*")):
        if _is_unfinished(folder) and _is_of(folder, config, environment):
            return folder
    for number in itertools.count(1):
        folder = output / f"{what}-{environment.stem}{'' if number == 1 else f'-{number}'}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    _write_json(folder / ENVIRONMENT, asdict(environment))
    _write_json(folder / CONFIG, config)
    return folder


def _is_unfinished(folder: Path) -> bool:
    # What was done in parts goes last.
    return (folder / PARTS).exists() or not (folder / METRICS).exists()


def _is_of(folder: Path, config: Mapping[str, Any], environment: RunEnvironment) -> bool:
    try:
        stored, place = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, ENVIRONMENT))
    except (OSError, ValueError):  # of something else, or not complete
        return False
    here = asdict(environment)
    return stored == config and all(place.get(name) == here[name] for name in here if name not in _MAY_DIFFER)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
