"""The files of the package that go along with a checkpoint, as its code."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "hivtp_hf"
# Those that a checkpoint names: transformers copies them, and all that they import.
_KINDS = ("configuration", "processing", "modeling")
FAMILY_FILES = sorted(path.stem for kind in _KINDS for path in PACKAGE.glob(f"{kind}_*.py"))


def imported(name: str) -> tuple[set[str], set[str]]:
    """What a file imports anywhere in it: the names of siblings, and the top-level names of others."""
    siblings: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{name} imports from outside its folder"
            assert node.module, f"{name} imports the package itself, which does not travel"
            siblings.add(node.module)
    return siblings, others


def needed_files(name: str) -> set[str]:
    """The siblings that a file needs beside itself, also indirectly."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        new = imported(waiting.pop())[0] - found
        found |= new
        waiting |= new
    return found - {name}
