"""The command line `hivtp`, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import GEOMETRY, build_pruned_checkpoint
from hivtp_hf import TokenLayout
from hivtp_hf.checkpoints.language_model_cost import kv_cache_bytes, prefill_flops
from hivtp_hf.pruning.compat import cache_of
from hivtp_hf.pruning.registry import METHODS
from tiny_checkpoint import build_stock_checkpoint, tiny_config, tiny_model
from tiny_models import photo

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("stock") / "checkpoint", **GEOMETRY)


def test_it_runs_as_a_module(stock):
    command = [sys.executable, "-m", "hivtp_hf.cli", "inspect", str(stock), "--size", "60x100", "--retention-ratio", "50"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("hivtp: `retention_ratio` is 50.0")


def test_help_lists_every_setting(hivtp):
    shown = hivtp("convert", "--help").stdout
    for method in METHODS.values():
        for setting in method.settings:
            assert f"--{setting.name.replace('_', '-')}"[:20] in shown
    assert "--token-budget" in shown


def test_convert_then_inspect(hivtp, stock, tmp_path):
    target = tmp_path / "pruned"
    options = "--method hiprune --object-layer 5 --published-borders --retention-ratio 0.25"
    done = hivtp("convert", stock, target, *options.split())
    assert done.returncode == 0, done.stderr
    photo(90, 130).save(tmp_path / "photo.png")
    done = hivtp("inspect", target, tmp_path / "photo.png", "--size", "60x100", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model_type"] == "hivtp_llava_next"
    assert report["pruning_config"]["published_borders"] is True
    assert [(row["height"], row["width"]) for row in report["sizes"]] == [(60, 100), (90, 130)]
    for row in report["sizes"]:
        layout = TokenLayout.from_image_size(
            row["height"], row["width"], report["pruning_config"], pinpoints=PINPOINTS, **GEOMETRY
        )
        assert (row["stock_tokens"], row["retained_tokens"]) == (layout.num_stock, layout.num_retained)
    # Stages, as a table and as numbers.
    staged = ("inspect", stock, "--size", "60x100", "--retention-ratio", "0.5", "--stages", "1:0.5")
    report = json.loads(hivtp(*staged, "--json").stdout)
    (row,) = report["sizes"]
    (stage,) = row["stages"]
    patches = row["retained_tokens"] - row["newlines"]
    assert stage == {"layer": 1, "tokens": row["newlines"] + patches - round(patches / 2)}
    seen = (row["retained_tokens"] + 2 * stage["tokens"]) / 3
    assert row["average_retention"] == pytest.approx(seen / row["stock_tokens"])
    table = hivtp("inspect", stock, "--size", "672x672", "--retention-ratio", "0.5", "--stages", "1:0.5")
    assert "from layer 1; their mean" in " ".join(table.stdout.split()), table.stderr
    assert "…" not in table.stdout
    # Settings are tried without being stored.
    table = hivtp("inspect", stock, "--size", "60x100", "--method", "hiprune")
    assert table.returncode == 0, table.stderr
    assert "60 x 100" in table.stdout
    assert "…" not in table.stdout  # not even at the 80 columns of a pipe
    assert "hiprune" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["convert", "{stock}", "{new}", "--method", "gprune", "--alpha", "0.1"], "not a setting of the method 'gprune'"),
        (["convert", "{new}", "{new}2"], "is no folder"),
        (["inspect", "{stock}", "--size", "12"], "HEIGHTxWIDTH"),
        (["inspect", "{stock}", "{new}.png"], "No such file"),
    ],
)
def test_errors_are_one_message(hivtp, arguments, named, stock, tmp_path):
    done = hivtp(*(argument.format(stock=stock, new=tmp_path / "new") for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("hivtp: ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_costs_are_those_of_the_model():
    """Held against what torch counts in a real pass, and against the tensors of a real cache."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(tiny_config(**GEOMETRY, text_layers=3))
    model.set_attn_implementation("eager")  # all pairs of tokens, as matrix products
    tokens, text_config = 37, model.config.get_text_config()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=torch.full((1, tokens), 7), use_cache=True, logits_to_keep=1)
    angles_of_positions = 2 * tokens * text_config.head_dim // 2  # a matrix product in older releases
    assert counter.get_total_flops() - prefill_flops(text_config, tokens) in (0, angles_of_positions)
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(output).layers)
    assert cached == kv_cache_bytes(text_config, tokens, torch.float32)


def test_methods_are_shown_as_the_docs_have_them(hivtp):
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert hivtp("methods", "--markdown").stdout == page
    shown = hivtp("methods").stdout
    for method in METHODS.values():
        assert f"| {method.name} | {'CLS | CLS' if method.name == 'cls_attention' else 'yes | yes'} |" in page
        assert method.rule in shown
        for setting in method.settings:
            assert str(setting) in shown


def test_inspect_says_whose_code_a_checkpoint_has(hivtp, tmp_path):
    pruned = build_pruned_checkpoint(tmp_path, {"retention_ratio": 0.4})
    code = pruned / "hivtp_llava_next.py"
    assert hivtp("bundle", "llava_next").stdout == code.read_text(encoding="utf-8")
    assert "the same as that of the installed release" in hivtp("inspect", pruned, "--size", "60x100").stdout
    code.write_text(code.read_text(encoding="utf-8").replace("return", "return ", 1), encoding="utf-8")
    assert "CHANGED since it was written" in hivtp("inspect", pruned, "--size", "60x100").stdout
    told = json.loads(hivtp("inspect", pruned, "--size", "60x100", "--json").stdout)["remote_code"]
    assert (told["family"], told["is_unchanged"], told["is_current"]) == ("llava_next", False, False)
