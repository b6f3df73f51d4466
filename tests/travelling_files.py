"""Names in each family's files all that must travel with them; `make format` runs it.

A checkpoint carries the code beside its weights, and transformers 5.6 copies from there only what a file itself names in
lines `from .name import X`: it looks no deeper. So every file that is loaded first ends its imports with a block that names
the rest. The block never runs, so that nothing is imported before it is used.
"""

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "hivtp_hf"
FAMILY_FILES = sorted(path for kind in ("configuration", "processing", "modeling") for path in PACKAGE.glob(f"{kind}_*.py"))

_BLOCK = re.compile(r"\nif TYPE_CHECKING:  # names what travels along.*\n(?:    from .*\n)+")
_TITLE = "if TYPE_CHECKING:  # names what travels along, as transformers 5.6 looks no deeper; `make format` writes it"


def named_files(source: str) -> set[str]:
    """The siblings that a file's text names, without their suffix: found as transformers finds them."""
    return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE))


def needed_files(path: Path) -> set[str]:
    """The siblings that a file needs, also indirectly, without their suffix."""
    found: set[str] = set()
    waiting = named_files(_BLOCK.sub("", path.read_text()))
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= named_files((PACKAGE / f"{name}.py").read_text()) - found
    return found - {path.stem}


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


def with_block(path: Path) -> str:
    """The file's text as it should be."""
    source = _BLOCK.sub("", path.read_text())
    missing = sorted(needed_files(path) - named_files(source))
    lines = [f"    from .{name} import {_a_public_name(name)}  # noqa: F401" for name in missing]
    tree = ast.parse(source)
    last_import = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    kept = source.splitlines(keepends=True)
    return "".join(kept[:last_import]) + "\n" + "\n".join([_TITLE, *lines]) + "\n" + "".join(kept[last_import:])


def _a_public_name(module: str) -> str:
    body = ast.parse((PACKAGE / f"{module}.py").read_text()).body
    definitions = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return next(name for name in definitions if not name.startswith("_"))


def main() -> None:
    """Writes the blocks; with `--check` only says which files want one."""
    wrong = [path for path in FAMILY_FILES if path.read_text() != with_block(path)]
    for path in wrong:
        if "--check" not in sys.argv:
            path.write_text(with_block(path))
        print(f"{path.name}: names of travelling files {'missing' if '--check' in sys.argv else 'written'}")
    sys.exit("--check" in sys.argv and bool(wrong))


if __name__ == "__main__":
    main()
