"""The questions that are asked where no data is given: the held-out ones of examples/shapes_vqa, in a clone of the project."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from .rows import Row

NAME = "shapes-vqa"
NUMBER = 2000
_MODULE = "examples.shapes_vqa.held_out"


def example_rows(number: int) -> Iterator[Row]:
    """The first so many held-out questions, drawn by the generator in the current directory.

    Raises:
        ValueError: outside a clone, and where the generator cannot be imported.
    """
    clone = Path.cwd()
    file = clone.joinpath(*_MODULE.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(
            f"no `--data` was given, and {clone} is no clone of the project, whose examples/shapes_vqa makes questions. Give "
            "`--data FOLDER` with a table questions.csv, or run this in a clone."
        )
    sys.path.insert(0, str(clone))
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ValueError(
            f'{file} cannot be imported: {error}. Install what the examples need with `pip install -e ".[demo]"`, or give '
            "`--data FOLDER`."
        ) from error
    finally:
        sys.path.remove(str(clone))
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise ValueError(
            f"the name {_MODULE} means {module.__file__} here, and not {file}. Give `--data FOLDER`, or uninstall the package "
            "that brings that file."
        )
    yield from module.held_out_rows(number)
