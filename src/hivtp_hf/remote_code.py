"""One family and all that it needs, as one readable Python file: the remote code of its checkpoints.

Source lies in folders; a checkpoint's code must not. So what a family's file imports of ours, directly and indirectly, is put
into one text in the order in which it is needed, each file under a banner that names it. Imports from outside stand once, on
top, and imports among our own files go. Nothing else changes, and nothing is kept that is not needed.
"""

import ast
import functools
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from ._version import __version__
from .families import FAMILIES

_PACKAGE = Path(__file__).resolve().parent
_HEADER = re.compile(
    r"# Written by hivtp_hf (?P<version>\S+)(?: at commit (?P<commit>[0-9a-f]{40}))?, family (?P<family>\w+)\.\n"
    r"# SHA-256 of all that follows this line: (?P<hash>[0-9a-f]{64})\n"
)


class BundledCode(NamedTuple):
    """What the remote code of a checkpoint says of itself, and whether that is so.

    Attributes:
        version: of the package that wrote it.
        commit: of the clone that wrote it; None where it was written by an installed release.
        family: whose code it is.
        is_unchanged: whether it is as it was written.
        is_current: whether the installed package would write the same code.
    """

    version: str
    commit: str | None
    family: str
    is_unchanged: bool
    is_current: bool


class _SourceFile(NamedTuple):
    """One file of the package, taken apart.

    Attributes:
        needs: the files of ours that it imports, in its own order.
        imports: what it imports from outside: the statement, one name each, by the name that it binds.
        documentation: its docstring.
        body: its text without docstring and imports.
        names: what it defines at its top level.
    """

    needs: list[Path]
    imports: dict[str, str]
    documentation: str
    body: str
    names: set[str]


@functools.cache
def bundle(family: str) -> str:
    """The text of the one Python file that checkpoints of a family carry.

    Args:
        family: its name, such as "llava_next".

    Raises:
        ValueError: for an unknown family, and where two source files cannot stand in one: the same name at the top level of
            both, or one imported under another name.
    """
    known = [entry.name for entry in FAMILIES]
    if family not in known:
        raise ValueError(f"{family!r} is no family; known are {', '.join(known)}.")
    ordered: dict[Path, _SourceFile] = {}
    _add(_PACKAGE / "families" / f"{family}.py", ordered)
    _check_names(ordered)
    body = "\n\n".join([_imports_of(ordered), *(_section(path, source) for path, source in ordered.items())])
    body = f'"""Visual token pruning for checkpoints of the family {family}, by hivtp_hf."""\n\n{body}\n'
    at_commit = f" at commit {commit}" if (commit := _commit_of_clone()) else ""
    return (
        f"# Written by hivtp_hf {__version__}{at_commit}, family {family}.\n"
        f"# SHA-256 of all that follows this line: {_hash_of(body)}\n{body}"
    )


def read_bundle(text: str) -> BundledCode | None:
    """What a file says that `bundle` wrote; None for any other text."""
    header = _HEADER.match(text)
    if header is None:
        return None
    body = text[header.end() :]
    family = header["family"]
    is_current = any(entry.name == family for entry in FAMILIES) and bundle(family).endswith(body)
    return BundledCode(header["version"], header["commit"], family, _hash_of(body) == header["hash"], is_current)


def _add(path: Path, ordered: dict[Path, _SourceFile]) -> None:
    """Adds a file behind all that it needs."""
    if path not in ordered:
        source = _taken_apart(path)
        for needed in source.needs:
            _add(needed, ordered)
        ordered[path] = source


def _taken_apart(path: Path) -> _SourceFile:
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    needs: list[Path] = []
    imports: dict[str, str] = {}
    names: set[str] = set()
    dropped: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if isinstance(node, ast.ImportFrom) and node.level:
                if any(alias.asname for alias in node.names):
                    raise ValueError(f"{path} line {node.lineno} imports a name of ours under another, which one file cannot.")
                needs.append(_file_of(path, node))
                continue
            origin = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                renamed = f" as {alias.asname}" if alias.asname else ""
                bound = alias.asname or (alias.name if origin else alias.name.partition(".")[0])
                imports[bound] = f"{origin}import {alias.name}{renamed}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            names.update(part.id for part in stored)
    documentation = ast.get_docstring(tree) or ""
    if documentation:
        dropped.update(range(tree.body[0].lineno, (tree.body[0].end_lineno or 1) + 1))
    kept = [line for number, line in enumerate(lines, 1) if number not in dropped]
    body = re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).strip("\n")
    return _SourceFile(needs, imports, documentation, body, names)


def _file_of(path: Path, node: ast.ImportFrom) -> Path:
    """The file of ours that an import is from."""
    found = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return found.with_suffix(".py") if found.with_suffix(".py").is_file() else found / "__init__.py"


def _check_names(ordered: dict[Path, _SourceFile]) -> None:
    owners: dict[str, Any] = {}
    for path, source in ordered.items():
        for name in source.names - {"__all__"}:
            if name in owners:
                raise ValueError(f"{owners[name]} and {path} both define {name!r} at their top level; rename one of them.")
            owners[name] = path
    for path, source in ordered.items():
        for name, statement in source.imports.items():
            if owners.setdefault(name, statement) != statement:
                raise ValueError(
                    f"{path} has {statement!r}, but {name!r} is from {owners[name]} elsewhere; rename one of them."
                )


def _imports_of(ordered: dict[Path, _SourceFile]) -> str:
    statements = {statement for source in ordered.values() for statement in source.imports.values()}
    whole = sorted(statement for statement in statements if statement.startswith("import "))
    named: dict[str, list[str]] = {}
    for statement in sorted(statements.difference(whole)):
        origin, _, name = statement.partition(" import ")
        named.setdefault(origin, []).append(name)
    return "\n".join([*whole, *(f"{origin} import {', '.join(names)}" for origin, names in named.items())])


def _section(path: Path, source: _SourceFile) -> str:
    rule = "# " + "=" * 100
    banner = [path.relative_to(_PACKAGE).as_posix(), "", *source.documentation.splitlines()]
    comments = "\n".join(f"# {line}".rstrip() for line in banner)
    return f"\n{rule}\n{comments}\n{rule}\n\n\n{source.body}" if source.body else f"\n{rule}\n{comments}\n{rule}"


def _hash_of(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


@functools.cache
def _commit_of_clone() -> str | None:
    """The commit of the clone that this package is used from; None where it is installed, or has changes of its own."""
    if not (_PACKAGE.parents[1] / ".git").exists():
        return None
    try:
        status = _git("status", "--porcelain", "--", str(_PACKAGE))
        return None if status else _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True)
    return run.stdout.strip()
