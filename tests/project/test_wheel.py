"""The wheel holds all that it must, also the files that remote code is made of, and works without the source tree.

It is built as for a release: of the source distribution, and so of nothing that this lacks.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from families import FAMILIES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hivtp_hf"

PROGRAM = """
import sys
import hivtp_hf

assert hivtp_hf.__file__.startswith(sys.argv[1]), hivtp_hf.__file__
from families import FAMILIES
from hivtp_hf.checkpoints.model_card import model_card
from tiny_models import LOW_RATIO, photo, twins

for family in FAMILIES:
    pair = twins(LOW_RATIO, family=family)
    pair.pruned.save_pretrained(sys.argv[2] + "/" + family)
    pair.processor.save_pretrained(sys.argv[2] + "/" + family)
    assert "eprint = {2509.23663}" in str(model_card(sys.argv[2] + "/" + family, repo_id="owner/name"))
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")
    print(pair.pruned.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] - inputs.input_ids.shape[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: builds write into the source tree, and tests of several processes may build at once.
    tree = folder / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(tree)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_file(wheel):
    built = zipfile.ZipFile(wheel)
    files = {f"hivtp_hf/{path.relative_to(SOURCE).as_posix()}": path for path in SOURCE.rglob("*") if path.is_file()}
    expected = {name: path for name, path in files.items() if path.suffix != ".pyc"}
    assert {path.suffix for path in expected.values()} == {".py", ".jinja", ".typed"}
    assert {name for name in built.namelist() if name.startswith("hivtp_hf/")} == set(expected)
    assert all(built.read(name) == path.read_bytes() for name, path in expected.items())
    assert any(name.endswith("licenses/LICENSE") for name in built.namelist())


def test_the_wheel_works_alone(wheel, tmp_path):
    unpacked, checkpoint = tmp_path / "unpacked", tmp_path / "checkpoint"
    zipfile.ZipFile(wheel).extractall(unpacked)
    search_path = [unpacked, ROOT / "tests" / "support", ROOT / "examples"]
    program = f"import sys; sys.path[:0] = {[str(path) for path in search_path]!r}\n" + PROGRAM
    run = [sys.executable, "-c", program, str(unpacked), str(checkpoint)]
    output = subprocess.run(run, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert output.split() == ["2"] * len(FAMILIES)
    for family in FAMILIES:
        assert [path.name for path in (checkpoint / family).glob("*.py")] == [f"hivtp_{family}.py"]
