"""The lines of docs/publishing.md, run as they are printed, against a Hub on loopback.

What is left out of the print: the Hub's address and the login, which come by the environment, and the commit's hash, for
which a reader puts the one that `hivtp push` has printed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import PRUNED_NAME, ROOT, STOCK_NAME

from checkpoints import GEOMETRY
from hub_server import HubServer, run_client
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

EXAMPLES = ROOT / "examples"
NO_COMMIT = "0" * 40
WITHOUT_THE_PACKAGE = "import sys\nsys.modules['hivtp_hf'] = sys.modules['torchvision'] = None\n"
REPORT = """
import torch
model_and_settings = [type(model).__name__, model.config.pruning_config.to_dict(), processor.pruning_config.to_dict()]
return [*model_and_settings, float(model.lm_head.weight.float().sum())]
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = build_stock_checkpoint(tmp_path_factory.mktemp("stock") / "stock", **GEOMETRY)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def section(title: str) -> str:
    text = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def loaded(hub: HubServer, home: Path, commit: str) -> list:
    """What the lines for loading give in a process without the package."""
    code = (EXAMPLES / "load_published.py").read_text(encoding="utf-8")
    assert NO_COMMIT in code
    return run_client(hub, WITHOUT_THE_PACKAGE + code.replace(NO_COMMIT, commit) + REPORT, home=home, token=False)


def test_publish_your_own_and_load_one(stock, tmp_path):
    commands = re.findall(r"^    (hivtp .*)$", section("Publish your own"), flags=re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["convert", "inspect", "push"]
    with HubServer("your-name") as hub:
        base = hub.add_repository(STOCK_NAME, stock)
        environment = hub.environment(tmp_path / "home")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        work = tmp_path / "work"
        work.mkdir()
        run = subprocess.run(
            ["bash", "-e", "-c", "\n".join(commands)], cwd=work, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        commit = hub.commits(PRUNED_NAME)[0].oid
        assert commit in run.stdout
        pushed = hub.files(PRUNED_NAME)
        assert not [name for name in pushed if name.endswith((".safetensors", ".bin"))]
        assert sum(map(len, pushed.values())) < 700_000
        name, of_model, of_processor, head = loaded(hub, tmp_path / "reader", commit)
        assert name == "HIVTPLlavaNextForConditionalGeneration"
        assert of_model == of_processor
        assert of_model["retention_ratio"] == 0.25

        # The same from Python; the weights are the base's both times.
        run_client(hub, (EXAMPLES / "publish.py").read_text(encoding="utf-8") + "\nreturn None", home=tmp_path / "author")
        newest = hub.commits(PRUNED_NAME)[0].oid
        assert newest != commit
        assert loaded(hub, tmp_path / "reader", newest) == [name, of_model, of_processor, head]
        assert base in hub.files(PRUNED_NAME)["config.json"].decode()
