"""The folder of a run, which is another's only where that was interrupted, and what the run has done so far in it."""

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from .environment import RunEnvironment

try:
    import fcntl
except ImportError:  # Windows, where two runs of one configuration at a time are not noticed
    fcntl = None  # type: ignore[assignment]

CONFIG, ENVIRONMENT, PARTS = "config.json", "environment.json", "partial.jsonl"
METRICS, PREDICTIONS, PLOT = "metrics.csv", "predictions.csv", "accuracy.png"
# A run may go on tomorrow, and after a commit that leaves the package as it was; the code itself is in the configuration.
_MAY_DIFFER = ("date", "commit")


def check_output(output: Path) -> None:
    """A ValueError where no folder can be made."""
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"`--output` is {output}, but {path} is no folder; give another one.")


def run_folder(
    output: Path,
    what: str,
    config: Mapping[str, Any],
    environment: RunEnvironment,
    processes: int = 1,
    results: str = METRICS,
) -> Path:
    """The folder of a run, with its configuration and environment.

    That is the folder of a run of the same configuration in the same environment that was not finished, which then goes on;
    else a new one, `<what>-<environment>`, or `<what>-<environment>-2` and so on where that exists. A finished run is never
    touched again.

    Args:
        output: where the folders of runs lie; made if it does not exist.
        what: what is evaluated, as part of a file name.
        config: all that decides what the run's results are, as JSON types.
        environment: of this process.
        processes: how many share the run. Another number may go on with it.
        results: a file that a run writes at its end.
    """
    output.mkdir(parents=True, exist_ok=True)
    for folder in sorted(output.glob(f"{what}-*")):
        if _is_unfinished(folder, results) and _is_of(folder, config, environment):
            return folder
    for number in itertools.count(1):
        folder = output / f"{what}-{environment.stem}{'' if number == 1 else f'-{number}'}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    write_json(folder / ENVIRONMENT, {**asdict(environment), "processes": processes})
    write_json(folder / CONFIG, config)
    return folder


def _is_unfinished(folder: Path, results: str) -> bool:
    # What was done in parts goes last.
    return (folder / PARTS).exists() or not (folder / results).exists()


def _is_of(folder: Path, config: Mapping[str, Any], environment: RunEnvironment) -> bool:
    try:
        stored, place = (read_json(folder / name) for name in (CONFIG, ENVIRONMENT))
    except (OSError, ValueError):  # of something else, or not complete
        return False
    here = asdict(environment)
    return stored == config and all(place.get(name) == here[name] for name in here if name not in _MAY_DIFFER)


class FinishedParts:
    """The results of the parts that are finished, in a file with a JSON object a line.

    A part is written as one line and reaches the disk before the next one begins. A line that a crash has cut off is dropped,
    and its part is done again.

    Args:
        path: of the file, which is made if it does not exist and stays open until `close`.

    Attributes:
        results: by the number of the part, as JSON types.

    Raises:
        ValueError: while another process writes the same file, and for a line that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[int, Any] = {}
        self._file = open(path, "a+b")  # noqa: SIM115  (stays open)
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def add(self, part: int, results: Any) -> None:
        """Keeps the results of a part."""
        line = json.dumps({"part": part, "results": results})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[part] = json.loads(line)["results"]

    def close(self) -> None:
        """Lets others have the file."""
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.path.parent} is being written by another run. Wait for it, or give another `--output`."
            ) from None

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.results[record["part"]] = record["results"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} cannot be read: {error}. Delete the folder {self.path.parent} to begin anew."
                ) from None
        self._file.truncate(len(whole))
