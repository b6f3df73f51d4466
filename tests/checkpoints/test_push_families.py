"""Qwen-VL and LLaVA-OneVision checkpoints pushed to a Hub on loopback: what is there loads without the package."""

import json

import pytest

from hivtp_hf.checkpoints import convert_checkpoint
from hub_commands import contents, run_commands
from hub_server import HubServer
from nightly import mostly_nightly
from pushes import WEIGHTS, check_same_answers, check_that_no_token_got_out, pushed_commit
from tiny_onevision import save_stock_onevision_checkpoint
from tiny_qwen import OURS, save_stock_qwen_checkpoint

pytestmark = pytest.mark.once

PRUNING = {"method": "hiprune", "retention_ratio": 0.25, "object_layer": 2, "deep_layer": 3}
QWEN_PROMPT = "<|vision_start|><|image_pad|><|vision_end|>what"
VIDEO = {"size": {"shortest_edge": 3136, "longest_edge": 78400}, "fps": 3}


@pytest.mark.parametrize("family", mostly_nightly((*OURS, "llava_onevision"), lambda family: family == "qwen2_5_vl"))
def test_complete_and_config_only(family, tmp_path):
    """Both by the command line, the small one over weights that stay at their base; settings of videos go along."""
    stock = tmp_path / "stock"
    stock.mkdir()
    if family in OURS:
        save_stock_qwen_checkpoint(stock, family, sharp=True)
    else:
        save_stock_onevision_checkpoint(stock)
    (stock / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    whole, small = tmp_path / "whole", tmp_path / "small"
    convert_checkpoint(str(stock), whole, PRUNING, show_progress=False)
    settings = ["--method", "hiprune", "--retention-ratio", "0.25", "--object-layer", "2", "--deep-layer", "3"]
    with HubServer() as hub:
        pinned = hub.add_repository("owner/base", contents(stock))
        cases = [
            (["push", whole, "owner/whole"], hub.token),
            (["convert", "owner/base", small, "--config-only", *settings], hub.token),
            (["push", small, "owner/small"], hub.token),
        ]
        outcomes = run_commands(hub, tmp_path / "home", cases)
        assert [outcome["status"] for outcome in outcomes] == [0, 0, 0], outcomes
        check_that_no_token_got_out(hub, outcomes, [hub.token])
        names = "owner/whole", "owner/small"
        commits = [pushed_commit(outcome, name) for outcome, name in zip((outcomes[0], outcomes[2]), names, strict=True)]
        files = [hub.files(name) for name in names]
        assert [WEIGHTS in of_one for of_one in files] == [True, False]
        assert files[0][WEIGHTS] == (stock / WEIGHTS).read_bytes()
        assert json.loads(files[1]["config.json"])["base_model"] == {"name": "owner/base", "revision": pinned}
        for of_one in files:
            assert f"hivtp_{family}.py" in of_one
            assert json.loads(of_one["processor_config.json"])["video_processor"].items() >= VIDEO.items()
            assert ("At least one token of every image is kept, at any ratio." in of_one["README.md"].decode()) == (
                family in OURS
            )
        # Of the same weights under the same settings.
        pushed = dict.fromkeys(zip(names, commits, strict=True), whole)
        check_same_answers(hub, pushed, tmp_path / "loading", text=QWEN_PROMPT if family in OURS else "<image> what")
        assert not hub.unanswered
