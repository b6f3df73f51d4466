"""vLLM with several images in a prompt, budgets, other families, sharded heads, and checkpoints that cannot be served."""

import os
import shutil

import pytest
from PIL import Image

from asked import MAX_TOKENS, generated, rows
from engine_runs import run_engine
from examples.shapes_vqa.reference import CHECKPOINT
from examples.tiny_onevision_checkpoint import onevision_config, onevision_parts
from families import FAMILIES
from hivtp_hf.checkpoints import convert_checkpoint
from tiny_checkpoint import tiny_config, tiny_model, tiny_processor
from tiny_models import SMALL, photo, pruned_config, pruned_processor
from tiny_onevision import FAMILY as ONEVISION
from tiny_onevision import SMALL as ONEVISION_SMALL

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


def answers_of_generate(checkpoint, prompts, paths, tokens, **budget):
    """What `generate` makes of each prompt, in the engine's words."""
    images = [[Image.open(path) for path in of_prompt] for of_prompt in paths]
    expected = generated(checkpoint, prompts, images, tokens, **budget)
    return [{"prompt_tokens": answer.prompt_tokens, "token_ids": answer.token_ids} for answer in expected]


def saved(folder, images):
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


def test_two_images_in_a_prompt(tmp_path):
    checkpoint = convert_checkpoint(str(CHECKPOINT), tmp_path / "pruned", {"retention_ratio": 2 / 9}, show_progress=False)
    paths = saved(tmp_path, [row.open_image() for row in rows()[:12]])
    prompts = [f"USER: <image>\n<image>\n{row.question} ASSISTANT:" for row in rows()[:6]]
    pairs = list(zip(paths[::2], paths[1::2], strict=True))
    run = run_engine(tmp_path, checkpoint, prompts, pairs, MAX_TOKENS, limit_mm_per_prompt={"image": 2})
    assert run.answers == answers_of_generate(checkpoint, prompts, pairs, MAX_TOKENS), run.output[-8000:]


def test_requests_with_budgets_of_their_own(tmp_path):
    """One engine at several ratios; twice about one image, whose entries in the caches must not meet."""
    checkpoint = convert_checkpoint(str(CHECKPOINT), tmp_path / "pruned", {"retention_ratio": 1 / 2}, show_progress=False)
    budgets = [{}, {"retention_ratio": 2 / 9}, {"token_budget": 100}, {"retention_ratio": 1 / 9}]
    asked = [row for row in rows()[:4] for _ in budgets]
    paths = [[path] for path in saved(tmp_path, [row.open_image() for row in asked])]
    prompts = [f"USER: <image>\n{row.question} ASSISTANT:" for row in asked]
    run = run_engine(tmp_path, checkpoint, prompts, paths, MAX_TOKENS, processor=budgets * 4)
    assert run.answers is not None, run.output[-8000:]
    expected = []
    for prompt, of_prompt, budget in zip(prompts, paths, budgets * 4, strict=True):
        expected += answers_of_generate(checkpoint, [prompt], [of_prompt], MAX_TOKENS, **budget)
    assert run.answers == expected
    assert len({answer["prompt_tokens"] for answer in expected[:4]}) == 4


def test_a_budget_of_the_engine(tmp_path):
    """For all of its requests, beside another in the checkpoint."""
    checkpoint = convert_checkpoint(str(CHECKPOINT), tmp_path / "pruned", {"retention_ratio": 1 / 2}, show_progress=False)
    paths = [[path] for path in saved(tmp_path, [row.open_image() for row in rows()[:6]])]
    prompts = [f"USER: <image>\n{row.question} ASSISTANT:" for row in rows()[:6]]
    budget = {"retention_ratio": 2 / 9}
    run = run_engine(tmp_path, checkpoint, prompts, paths, MAX_TOKENS, mm_processor_kwargs=budget)
    assert run.answers == answers_of_generate(checkpoint, prompts, paths, MAX_TOKENS, **budget), run.output[-8000:]


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="vLLM compiles C++ for a CPU")
def test_the_compiled_language_model(tmp_path):
    """As an engine runs without `enforce_eager`."""
    checkpoint = convert_checkpoint(str(CHECKPOINT), tmp_path / "pruned", {"retention_ratio": 2 / 9}, show_progress=False)
    paths = [[path] for path in saved(tmp_path, [row.open_image() for row in rows()[:16]])]
    prompts = [f"USER: <image>\n{row.question} ASSISTANT:" for row in rows()[:16]]
    run = run_engine(tmp_path, checkpoint, prompts, paths, MAX_TOKENS, enforce_eager=False)
    assert run.answers == answers_of_generate(checkpoint, prompts, paths, MAX_TOKENS), run.output[-8000:]
    assert "Warming up model for the compilation" in run.output


def with_heads_for_the_engine(config):
    """A configuration whose language model has two heads, of a size that the engine takes."""
    config.text_config.head_dim = 64
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 2
    return config


def save_tiny_checkpoint(folder, family, pruning):
    """A pruned checkpoint of random weights."""
    config = with_heads_for_the_engine(tiny_config(**SMALL, family=family, text_width=128))
    model = FAMILIES[family].model(pruned_config(config, pruning))
    model.load_state_dict(tiny_model(config).state_dict())
    model.save_pretrained(folder)
    pruned_processor(tiny_processor(config), pruning).save_pretrained(folder)


def save_onevision_checkpoint(folder, pruning):
    """The same for LLaVA-OneVision."""
    config = with_heads_for_the_engine(onevision_config(**ONEVISION_SMALL, text_width=128))
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    model = ONEVISION.model(ONEVISION.config(**values, pruning_config=pruning))
    model.load_state_dict(tiny_model(config).state_dict())
    model.save_pretrained(folder)
    ONEVISION.processor(**onevision_parts(config), pruning_config=pruning).save_pretrained(folder)


PHOTOS = [(60, 100), (100, 60), (170, 50), (90, 90)]


def saved_photos(folder):
    return [[path] for path in saved(folder, [photo(*size, seed) for seed, size in enumerate(PHOTOS)])]


@pytest.mark.parametrize("method", ["hivtp", "gprune"])
def test_llava(method, tmp_path):
    save_tiny_checkpoint(tmp_path / "pruned", "llava", {"method": method, "retention_ratio": 0.3})
    paths = saved_photos(tmp_path)
    prompts = [PROMPT] * len(paths)
    run = run_engine(tmp_path, tmp_path / "pruned", prompts, paths, 8)
    expected = answers_of_generate(tmp_path / "pruned", prompts, paths, 8)
    assert run.answers == expected, run.output[-8000:]
    assert len({tuple(answer["token_ids"]) for answer in expected}) > 1  # or equal answers would prove nothing


def test_llava_onevision(tmp_path):
    save_onevision_checkpoint(tmp_path / "pruned", {"retention_ratio": 0.3})
    paths = saved_photos(tmp_path)
    prompts = [PROMPT] * len(paths)
    run = run_engine(tmp_path, tmp_path / "pruned", prompts, paths, 8, limit_mm_per_prompt={"image": 1, "video": 0})
    expected = answers_of_generate(tmp_path / "pruned", prompts, paths, 8)
    assert run.answers == expected, run.output[-8000:]
    assert len({tuple(answer["token_ids"]) for answer in expected}) > 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="every rank needs a core of its own")
def test_two_ranks_keep_what_one_keeps(tmp_path):
    save_tiny_checkpoint(tmp_path / "pruned", "llava_next", {"retention_ratio": 0.3})
    paths = saved_photos(tmp_path)
    prompts = [PROMPT] * len(paths)
    first, second, *_ = sorted(os.sched_getaffinity(0))
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    run = run_engine(tmp_path, tmp_path / "pruned", prompts, paths, 8, cores, tensor_parallel_size=2)
    assert run.answers == answers_of_generate(tmp_path / "pruned", prompts, paths, 8), run.output[-8000:]


@pytest.mark.parametrize(
    ("settings", "config_only", "message"),
    [
        ({"retention_ratio": 2 / 9}, True, "make a complete checkpoint with `hivtp convert CHECKPOINT TARGET`"),
        ({"exact_count": False}, False, "Set `exact_count=True` in the pruning_config of model and processor."),
    ],
    ids=["config-only", "exact_count=False"],
)
def test_a_checkpoint_that_cannot_be_served(settings, config_only, message, tmp_path):
    target = tmp_path / "checkpoint"
    checkpoint = convert_checkpoint(str(CHECKPOINT), target, settings, config_only=config_only, show_progress=False)
    paths = saved(tmp_path, [photo(96, 96)])
    run = run_engine(tmp_path, checkpoint, [PROMPT], [paths], 1)
    assert run.answers is None
    assert message in run.output
