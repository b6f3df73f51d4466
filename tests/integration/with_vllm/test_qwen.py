"""Qwen2.5-VL in vLLM: unpruned, and under methods that look at no image, as `generate` answers; others are refused."""

import pytest

from asked import generated
from engine_runs import run_engine
from tiny_models import photo
from tiny_qwen import save_qwen_checkpoint

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is shown?"
TWO = "<|vision_start|><|image_pad|><|vision_end|>Before. <|vision_start|><|image_pad|><|vision_end|>Behind. What changed?"
# One head, of a size that the engine takes, and its shares of time, height and width.
TEXT = {
    "head_dim": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
}


def checkpoint_of(folder, family, pruning):
    save_qwen_checkpoint(folder, family, pruning, sharp=True, text_config=TEXT)
    return folder


@pytest.mark.parametrize("method", ["none", "uniform", "random"])
def test_answers_are_those_of_generate(method, tmp_path):
    pruning = {"method": method} if method == "none" else {"method": method, "retention_ratio": 0.3}
    checkpoint = checkpoint_of(tmp_path / "pruned", "qwen2_5_vl", pruning)
    photos = [photo(130, 220), photo(300, 150, 1), photo(224, 224, 2), photo(100, 400, 3)]
    paths = [tmp_path / f"{index}.png" for index in range(len(photos))]
    for path, image in zip(paths, photos, strict=True):
        image.save(path)
    prompts = [PROMPT] * 4 + [TWO] * 2
    of_prompts = [[0], [1], [2], [3], [0, 1], [3, 2]]
    run = run_engine(
        tmp_path,
        checkpoint,
        prompts,
        [[paths[index] for index in of_prompt] for of_prompt in of_prompts],
        8,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    assert run.answers is not None, run.output[-8000:]
    expected = generated(checkpoint, prompts, [[photos[index] for index in of_prompt] for of_prompt in of_prompts], 8)
    assert [answer["prompt_tokens"] for answer in run.answers] == [answer.prompt_tokens for answer in expected]
    assert [answer["token_ids"] for answer in run.answers] == [answer.token_ids for answer in expected]
    assert len({tuple(answer.token_ids) for answer in expected}) > 3  # or equal answers would prove nothing


@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen2_5_vl", "positions are asked for before images"), ("qwen3_vl", "`deepstack_features` of images are dropped")],
)
def test_what_would_be_answered_wrongly_is_refused(family, message, tmp_path):
    checkpoint = checkpoint_of(tmp_path / "pruned", family, {"method": "hiprune", "retention_ratio": 0.3})
    photo(130, 220).save(tmp_path / "image.png")
    run = run_engine(
        tmp_path, checkpoint, [PROMPT], [[tmp_path / "image.png"]], 1, limit_mm_per_prompt={"image": 1, "video": 0}
    )
    assert run.answers is None
    assert message in run.output, run.output[-8000:]
