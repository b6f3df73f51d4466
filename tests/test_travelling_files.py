"""Each family's files name all that must travel with them, run none of it early, and need only what every user has."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import travelling_files
from families import FAMILIES
from hivtp_hf.methods import METHODS
from travelling_files import FAMILY_FILES, PACKAGE, imported, needed_files, with_block

TRAVELLING = sorted({path.stem for path in FAMILY_FILES}.union(*map(needed_files, FAMILY_FILES)))


def test_every_family_is_looked_at():
    kinds = ("configuration", "modeling", "processing")
    assert {path.stem for path in FAMILY_FILES} == {f"{kind}_hivtp_{family}" for kind in kinds for family in FAMILIES}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "_version"} == set(TRAVELLING)


@pytest.mark.parametrize("path", FAMILY_FILES, ids=lambda path: path.stem)
def test_blocks_are_up_to_date(path):
    assert with_block(path) == path.read_text(), "run `make format`"


LOADED = """
import json
import sys
import hivtp_hf

def selectors():
    return sorted(name.removeprefix("hivtp_hf.") for name in sys.modules if name.startswith("hivtp_hf.selectors_"))

at_first = selectors()
assert callable(hivtp_hf.select_hivtp)
print(json.dumps([at_first, selectors()]))
"""


def test_importing_the_package_imports_no_selector():
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [[], ["selectors_hivtp"]]
    # All of them are there to be imported, one way or the other.
    assert {f"selectors_{name}" for name in METHODS if name != "none"} == {name for name in TRAVELLING if "selectors" in name}


@pytest.mark.parametrize("name", TRAVELLING)
def test_imports_of_a_travelling_file(name):
    siblings, others = imported(name)
    assert others <= sys.stdlib_module_names | {"numpy", "torch", "transformers"}
    assert all((PACKAGE / f"{sibling}.py").is_file() for sibling in siblings)
    # What transformers reads off a file's text is what Python reads.
    assert siblings == travelling_files.named_files((PACKAGE / f"{name}.py").read_text())


NEW_SELECTOR = '''"""A new method."""

from .new_helper import help_along


def select_new(valid, pruning):
    return help_along(valid)
'''
NEW_ENTRY = """


def _new_selector() -> Selector:
    from .selectors_new import select_new

    return Selector(select=lambda seen, pruning: select_new(seen.valid, pruning), count=lambda layout, pruning: (1,))


METHODS["new"] = PruningMethod(name="new", hyperparameters=(), load_selector=_new_selector)
"""


def test_a_new_method_is_picked_up(tmp_path):
    """One new file with a helper of its own and one entry: every block names both, and transformers finds them."""
    package = shutil.copytree(PACKAGE, tmp_path / "src" / "hivtp_hf")
    script = tmp_path / "tests" / "travelling_files.py"
    script.parent.mkdir()
    shutil.copy(travelling_files.__file__, script)

    def run(*arguments):
        finished = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
        return finished.returncode, finished.stdout

    assert run("--check") == (0, "")
    (package / "selectors_new.py").write_text(NEW_SELECTOR)
    (package / "new_helper.py").write_text("def help_along(valid):\n    return valid\n")
    with (package / "methods.py").open("a") as methods:
        methods.write(NEW_ENTRY)
    before = {path.name: path.read_text() for path in package.glob("*.py")}
    code, said = run("--check")
    assert code == 1
    assert all(f"{path.name}: names of travelling files missing" in said for path in FAMILY_FILES)
    assert {path.name: path.read_text() for path in package.glob("*.py")} == before
    assert run()[0] == 0
    assert run("--check") == (0, "")
    for path in FAMILY_FILES:
        text = (package / path.name).read_text()
        assert "    from .selectors_new import select_new  # noqa: F401\n" in text
        assert "    from .new_helper import help_along  # noqa: F401\n" in text
        assert len(text.splitlines()) == len(path.read_text().splitlines()) + 2
    changed = {path.name for path in package.glob("*.py") if path.read_text() != before[path.name]}
    assert changed == {path.name for path in FAMILY_FILES}


def test_the_package_that_is_tested_is_the_one_that_is_looked_at():
    assert Path(importlib.util.find_spec("hivtp_hf").origin).parent == PACKAGE
