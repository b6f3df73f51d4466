"""What the package imports it declares: in its dependencies, or in an extra that the importing folder is for."""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from forked import run_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "hivtp_hf"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where the name of an import is not that of what is installed.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# What a folder may need beyond the dependencies; the files of all others run with these alone.
EXTRAS = {
    "cli": ["images", "plots"],
    "evaluation": ["images", "plots", "data"],
    "figures": ["images", "plots"],
    "lmms_eval": ["images", "lmms-eval"],
    "serving": ["images", "serving"],
    "tuning": ["images", "tune"],
}

pytestmark = pytest.mark.once


def names_of(requirements):
    return {normalised(re.match(r"[\w-]+", requirement).group()) for requirement in requirements}


def normalised(name):
    return DISTRIBUTIONS.get(name, name).lower().replace("_", "-")


def imported(path):
    """The top-level names that a file imports anywhere in it, beside the standard library and the package itself."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("folder", [".", *sorted({path.parent.name for path in PACKAGE.glob("*/*.py")})])
def test_imports_are_declared(folder):
    declared = names_of(PROJECT["dependencies"])
    for extra in EXTRAS.get(folder, ()):
        declared |= names_of(PROJECT["optional-dependencies"][extra])
    used = {normalised(name) for path in (PACKAGE / folder).glob("*.py") for name in imported(path)}
    assert used <= declared


def test_no_extra_is_allowed_in_vain():
    for folder, extras in EXTRAS.items():
        used = {normalised(name) for path in (PACKAGE / folder).glob("*.py") for name in imported(path)}
        for extra in extras:
            assert used & names_of(PROJECT["optional-dependencies"][extra]), (folder, extra)


def test_pictures_and_commands_need_neither_matplotlib_nor_optuna(tmp_path):
    program = """
import sys
sys.modules["matplotlib"] = sys.modules["optuna"] = None
import hivtp_hf.cli, hivtp_hf.evaluation, hivtp_hf.figures.dispersion, hivtp_hf.tuning
"""
    run_python(["-c", program], tmp_path, os.environ).check_returncode()
