"""`FinishedParts`: what a run has done so far, on disk, so that it can go on after an interruption."""

import json
import os
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where two runs of one configuration at a time are not noticed
    fcntl = None  # type: ignore[assignment]


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
