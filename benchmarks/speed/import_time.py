"""Part "import": what `import hivtp_hf` adds to importing what it needs of other packages, in fresh processes."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import hivtp_hf

from .bench import Bench
from .interleaving import interleave
from .rows import Row, compared, measured

PART = "import"
# Measured in one process, one after the other: the difference of two processes' times would drown in their noise.
_BOTH = """
import importlib, json, sys, time
started = time.perf_counter()
{needed}
needed = time.perf_counter() - started
import hivtp_hf
added = time.perf_counter() - started - needed
ours = [name for name in sys.modules if name.startswith("hivtp_hf.")]
print(json.dumps({{"needed": needed, "added": added, "ours": ours}}))
"""
_OURS_FIRST = """
import json, sys, time
started = time.perf_counter()
import hivtp_hf
total = time.perf_counter() - started
print(json.dumps({"total": total, "ours": [name for name in sys.modules if name.startswith("hivtp_hf.")]}))
"""


def measure_import(bench: Bench) -> list[Row]:
    """Rows without an image: seconds, and how many selectors an import brings along, of which each belongs to one method."""
    modules = _fresh(_OURS_FIRST)["ours"]
    folder = Path(hivtp_hf.__file__).parent
    files = [folder / "__init__.py", *(folder.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in modules)]
    statements = needed_imports(path.read_text() for path in files if path.exists())
    runs = {"both": lambda: _fresh(_BOTH.format(needed="\n".join(statements))), "ours": lambda: _fresh(_OURS_FIRST)}
    # The very first process, above, was the warm-up: it read from the disk what later ones find in memory.
    results = interleave(runs, bench.settings.repeats_of(PART), warm_up=())
    added, needed = ([result[name] for result in results["both"]] for name in ("added", "needed"))
    total = [result["total"] for result in results["ours"]]
    selectors = [sum(".selectors_" in name for name in result["ours"]) for result in results["ours"]]
    return [
        measured(PART, "import of what hivtp_hf needs", "s", needed),
        measured(PART, "import of hivtp_hf after what it needs", "s", added),
        measured(PART, "import of hivtp_hf alone", "s", total),
        compared(PART, "import of hivtp_hf alone over what it needs", total, needed),
        measured(PART, "selectors imported", "modules", selectors),
    ]


def needed_imports(sources: Iterable[str]) -> list[str]:
    """The statements by which modules import other packages as they load, and the names that they ask of transformers.

    Args:
        sources: the modules' code. What stands in functions, or under `if TYPE_CHECKING`, is not run and not taken.
    """
    found: set[str] = set()
    for source in sources:
        tree = ast.parse(source)
        for statement in tree.body:
            is_from = isinstance(statement, ast.ImportFrom) and not statement.level and statement.module != "__future__"
            if isinstance(statement, ast.Import) or is_from:
                found.add(ast.unparse(statement))
        for node in ast.walk(tree):
            # Auto classes are asked for as attributes, one of them by a string that older releases cannot answer.
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "transformers":
                found.add(f"import transformers; transformers.{node.attr}")
            elif isinstance(node, ast.Constant) and str(node.value).startswith("AutoModelFor"):
                found.add(f"import transformers; getattr(transformers, {node.value!r}, None)")
    return sorted(found)


def _fresh(code: str) -> dict:
    """What a program prints as JSON, run by a fresh interpreter."""
    # With compiled bytecode on disk, as for every user from the second import on; else compiling would be most of it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"a fresh process failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])
