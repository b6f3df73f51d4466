"""Part "import": what `import hivtp_hf` adds to importing what it needs, and what remote code adds to loading stock."""

import ast
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import hivtp_hf
from examples.tiny_checkpoint import tiny_config, tiny_processor

from .bench import Bench
from .interleaving import interleave
from .rows import Row, compared, measured

PART = "import"
LOADING = "loading by remote code beyond stock"
# Measured in one process, one after the other: the difference of two processes' times would drown in their noise.
_BOTH = """
import importlib, json, sys, time
started = time.perf_counter()
{needed}
needed = time.perf_counter() - started
import hivtp_hf
added = time.perf_counter() - started - needed
print(json.dumps({{"needed": needed, "added": added}}))
"""
_OURS_FIRST = """
import json, sys, time
started = time.perf_counter()
import hivtp_hf
total = time.perf_counter() - started
print(json.dumps({"total": total, "ours": [name for name in sys.modules if name.startswith("hivtp_hf.")]}))
"""


# A configuration or a processor alone, without a model: what a process that makes inputs does.
_LOADING = """
import json, sys, time
sys.modules["hivtp_hf"] = None  # as where it is not installed
from transformers import {auto_class}
started = time.perf_counter()
{auto_class}.from_pretrained({folder!r}, trust_remote_code=True)
print(json.dumps({{"total": time.perf_counter() - started}}))
"""
_ALONE = {"AutoConfig": "a configuration alone", "AutoProcessor": "a processor alone"}


def measure_import(bench: Bench) -> list[Row]:
    """Rows without an image, in seconds."""
    modules = _fresh(_OURS_FIRST)["ours"]
    folder = Path(hivtp_hf.__file__).parent
    files = [folder / "__init__.py", *(folder.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in modules)]
    statements = needed_imports(path.read_text() for path in files if path.exists())
    runs = {"both": lambda: _fresh(_BOTH.format(needed="\n".join(statements))), "ours": lambda: _fresh(_OURS_FIRST)}
    with tempfile.TemporaryDirectory() as temporary:
        _write_checkpoints(Path(temporary))
        for auto_class, name in itertools.product(_ALONE, ("stock", "pruned")):
            code = _LOADING.format(auto_class=auto_class, folder=str(Path(temporary, name)))
            runs[f"{auto_class} {name}"] = functools.partial(_fresh, code)
        # The very first process, above, was the warm-up: it read from the disk what later ones find in memory. The copy of the
        # remote code, which transformers makes once, is made by a run that does not count.
        runs["AutoConfig pruned"]()
        results = interleave(runs, bench.settings.repeats_of(PART), warm_up=())
    added, needed = ([result[name] for result in results["both"]] for name in ("added", "needed"))
    total = [result["total"] for result in results["ours"]]
    return [
        measured(PART, "import of what hivtp_hf needs", "s", needed),
        measured(PART, "import of hivtp_hf after what it needs", "s", added),
        measured(PART, "import of hivtp_hf alone", "s", total),
        compared(PART, "import of hivtp_hf alone over what it needs", total, needed),
        *itertools.chain.from_iterable(_loading_rows(results, auto_class) for auto_class in _ALONE),
    ]


def _loading_rows(results: Mapping[str, Sequence[Mapping[str, float]]], auto_class: str) -> list[Row]:
    stock, remote = ([result["total"] for result in results[f"{auto_class} {name}"]] for name in ("stock", "pruned"))
    beyond = [ours - stocks for ours, stocks in zip(remote, stock, strict=True)]
    rows = {"loading, stock": stock, "loading, remote code": remote, LOADING: beyond}
    return [measured(PART, quantity, "s", values, note=_ALONE[auto_class]) for quantity, values in rows.items()]


def _write_checkpoints(folder: Path) -> None:
    """Configuration and processor of a small checkpoint, stock's and ours, in the folders "stock" and "pruned"."""
    config = tiny_config()
    tiny_processor(config).save_pretrained(folder / "stock")
    config.save_pretrained(folder / "stock")
    for part in (hivtp_hf.HIVTPLlavaNextConfig, hivtp_hf.HIVTPLlavaNextProcessor):
        part.from_pretrained(folder / "stock").save_pretrained(folder / "pruned")


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
