"""The files that travel with a checkpoint load what they need when they need it, and need only what every user has."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from families import FAMILIES
from hivtp_hf.pruning.registry import METHODS
from travelling_files import FAMILY_FILES, PACKAGE, imported, needed_files

TRAVELLING = sorted(set(FAMILY_FILES).union(*map(needed_files, FAMILY_FILES)))


def test_every_family_is_looked_at():
    kinds = ("configuration", "modeling", "processing")
    assert set(FAMILY_FILES) == {f"{kind}_hivtp_{family}" for kind in kinds for family in FAMILIES}
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "_version"} == set(TRAVELLING)


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
    assert siblings == set(get_relative_imports(PACKAGE / f"{name}.py"))


def test_the_package_that_is_tested_is_the_one_that_is_looked_at():
    assert Path(importlib.util.find_spec("hivtp_hf").origin).parent == PACKAGE
