"""Tensor parallelism: where two ranks share the heads of a model, both keep the tokens that one rank keeps."""

import json
import os
import sys
from pathlib import Path

import pytest

from families import FAMILIES
from forked import run_together
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration
from rank_of_two import answers
from tiny_checkpoint import tiny_config, tiny_model, tiny_processor
from tiny_models import SMALL, pruned_config, pruned_processor

METHODS = {
    "hivtp": {"retention_ratio": 0.3},
    "cls_attention": {"method": "cls_attention", "retention_ratio": 0.3},
}


def checkpoint(folder: Path, pruning) -> Path:
    """A checkpoint whose tower and language model have two heads of every kind, for two ranks."""
    config = tiny_config(**SMALL)
    config.text_config.num_key_value_heads = 2
    stock = tiny_model(config)
    pruned = FAMILIES["llava_next"].model(pruned_config(config, pruning))
    pruned.load_state_dict(stock.state_dict())
    pruned.save_pretrained(folder)
    pruned_processor(tiny_processor(config), pruning).save_pretrained(folder)
    return folder


def of_both_ranks(folder: Path, plan, port: int) -> list[dict]:
    """What two processes say that share the model by a plan."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    programs = [["-m", "rank_of_two", str(rank), str(port), str(folder), json.dumps(plan)] for rank in range(2)]
    ranks = run_together(programs, folder, environment)
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks]


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_tower_keeps_the_same_tokens_on_every_rank(method, tmp_path, free_port):
    folder = checkpoint(tmp_path / "checkpoint", METHODS[method])
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    alone = answers(model, folder)
    (path,) = {name.rpartition(".0.")[0] for name, _ in model.named_modules() if name.endswith(".0.self_attn.out_proj")}
    plan = {f"{path}.*.self_attn.{name}_proj": "colwise" for name in "qkv"} | {f"{path}.*.self_attn.out_proj": "rowwise"}
    for rank in of_both_ranks(folder, plan, free_port):
        assert rank == {**alone, "heads": [1]}


def test_the_plan_of_transformers_shards_the_language_model_alone(tmp_path, free_port):
    folder = checkpoint(tmp_path / "checkpoint", METHODS["hivtp"])
    alone = answers(HIVTPLlavaNextForConditionalGeneration.from_pretrained(folder).eval(), folder)
    for rank in of_both_ranks(folder, "auto", free_port):
        assert rank == {**alone, "heads": [2]}
