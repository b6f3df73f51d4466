"""Files that appear whole or not at all; and JSON, read with an error that names the file."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file of the same name elsewhere in the folder, and puts it at `path` once it is done."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
        unfinished = Path(folder, path.name)
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def read_json(path: Path, advice: str = "Get the file again.") -> dict[str, Any]:
    """The object that a file holds; a ValueError with the advice where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}. {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. {advice}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object, for people to read as well."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
