"""How source files depend on each other, and what a checkpoint's one file of code is made of."""

import ast
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from hivtp_hf import remote_code
from hivtp_hf.families import FAMILIES
from hivtp_hf.remote_code import bundle, read_bundle

pytestmark = pytest.mark.once
PACKAGE = Path(importlib.util.find_spec("hivtp_hf").origin).parent
# What is bundled, each folder with those that it may import from.
MAY_IMPORT = {"pruning": {"pruning"}, "methods": {"pruning", "methods"}, "families": {"pruning", "methods", "families"}}
FILES = sorted(PACKAGE.rglob("*.py"))
BUNDLED = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in MAY_IMPORT]


def imported_files(path):
    """The files of the package that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in [alias.name for alias in node.names]:
                for candidate in (
                    folder / f"{name}.py",
                    folder / name / "__init__.py",
                    folder.with_suffix(".py"),
                    folder / "__init__.py",
                ):
                    if candidate.is_file():
                        found.add(candidate)
                        break
    return found - {path}


def test_no_circle_of_files():
    imports = {path: imported_files(path) for path in FILES}
    finished = set()

    def visit(path, way):
        assert path not in way, " -> ".join(str(file.relative_to(PACKAGE)) for file in [*way[way.index(path) :], path])
        if path not in finished:
            for needed in imports[path]:
                visit(needed, [*way, path])
            finished.add(path)

    for path in FILES:
        visit(path, [])


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_is_bundled_imports_downwards(path):
    folder = path.relative_to(PACKAGE).parts[0]
    assert {file.relative_to(PACKAGE).parts[0] for file in imported_files(path)} <= MAY_IMPORT[folder]
    tree = ast.parse(path.read_text())
    others = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    others |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names | {"numpy", "torch", "transformers"}
    # One file cannot hold what is imported from another of ours within a function.
    assert all(node in tree.body for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_the_bundle_of_a_family(family):
    text = bundle(family)
    tree = ast.parse(text)
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))
    # Of other families it has nothing; the methods are all there.
    others = {entry.name for entry in FAMILIES} - {family}
    assert not any(f"# families/{other}.py" in text for other in others)
    assert all(f"# methods/{path.name}" in text for path in (PACKAGE / "methods").glob("*.py"))
    code = read_bundle(text)
    assert (code.family, code.version, code.is_unchanged, code.is_current) == (family, remote_code.__version__, True, True)


def test_a_changed_bundle_is_told_from_a_former_one(monkeypatch):
    text = bundle("llava")
    assert read_bundle(text.replace("return", "return ", 1))[3:] == (False, False)
    assert read_bundle("import torch\n") is None
    former = text.replace("one square tile", "a square tile")
    body = former.split("\n", 2)[2]
    former = former.replace(former.split("\n")[1], f"# SHA-256 of all that follows this line: {remote_code._hash_of(body)}")
    assert read_bundle(former)[3:] == (True, False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("def shown():\n    pass\n", "both define 'shown'"),
        ("from ..pruning.checked_values import shown as text_of\n", "imports a name of ours under another"),
        ("from json import loads as Tensor\n", "'Tensor' is"),
    ],
)
def test_what_cannot_stand_in_one_file(tmp_path, monkeypatch, more, message):
    shutil.copytree(PACKAGE, tmp_path / "hivtp_hf")
    with (tmp_path / "hivtp_hf" / "families" / "llava.py").open("a") as file:
        file.write(more)
    monkeypatch.setattr(remote_code, "_PACKAGE", tmp_path / "hivtp_hf")
    with pytest.raises(ValueError, match=message):
        bundle.__wrapped__("llava")


def test_an_unknown_family():
    with pytest.raises(ValueError, match=r"'llama' is no family; known are llava_next, llava"):
        bundle("llama")
