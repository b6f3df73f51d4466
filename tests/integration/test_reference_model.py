"""The trained reference model in examples/shapes_vqa: it sees, in stock classes as in ours, and needs the tokens it sees."""

import json

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
from typer.testing import CliRunner

from examples.shapes_vqa.reference import CHECKPOINT, a_question_of_each_type
from examples.shapes_vqa.vocabulary import QUESTION_TYPES
from hivtp_hf import HIVTPLlavaNextConfig, HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor, cli
from hivtp_hf.evaluation import evaluate_checkpoint
from research.shapes_vqa.references import REFERENCES


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    run = evaluate_checkpoint(
        str(CHECKPOINT),
        methods="hivtp,random",
        ratios="1,2/9,1/18",
        questions=240,
        dtype="float32",
        output=tmp_path_factory.mktemp("evaluation"),
    )
    return {(row.method, round(row.ratio, 2), row.question_type): row for row in run.metrics}


def test_its_files_are_small_and_say_what_it_is():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8e6
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llava_next"
    assert set(config["pruning_config"]) == {"method", "importance_start_layer", "importance_num_layers"}
    ours = REFERENCES["shapes-llava-next"].make_config().to_dict()
    for part in ("vision_config", "text_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert config[part][name] == ours[part][name]


@torch.no_grad()
def test_stock_classes_load_it_and_agree_with_ours():
    stock = LlavaNextForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    pruned = HIVTPLlavaNextForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    stock_processor = LlavaNextProcessor.from_pretrained(CHECKPOINT)
    processor = HIVTPLlavaNextProcessor.from_pretrained(CHECKPOINT)
    assert processor.pruning_config == pruned.config.pruning_config
    right = 0
    for row in a_question_of_each_type():
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        image = row.open_image()
        whole = stock_processor(images=image, text=prompt, return_tensors="pt")
        all_tokens = processor(images=image, text=prompt, retention_ratio=1.0, return_tensors="pt")
        logits = stock(**whole).logits
        assert torch.equal(pruned(**all_tokens).logits, logits)
        few = processor(images=image, text=prompt, retention_ratio=2 / 9, return_tensors="pt")
        assert few.input_ids.shape[1] < whole.input_ids.shape[1] / 3
        right += processor.decode(logits[0, -1].argmax()).strip() == row.answer
    assert right >= 5


def test_commands_take_the_settings_that_it_names(tmp_path):
    """Though its model type is stock's, as the classes do."""
    named = HIVTPLlavaNextConfig.from_pretrained(CHECKPOINT).pruning_config
    assert named.importance_start_layer != HIVTPLlavaNextConfig().pruning_config.importance_start_layer

    def output_of(*arguments):
        result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert json.loads(output_of("inspect", CHECKPOINT, "--json", "--size", "96x96"))["pruning_config"] == named.to_dict()
    output_of("convert", CHECKPOINT, tmp_path / "converted", "--config-only", "--retention-ratio", 0.25)
    converted = HIVTPLlavaNextConfig.from_pretrained(tmp_path / "converted").pruning_config
    assert converted == named.replace(retention_ratio=0.25)
    run = evaluate_checkpoint(str(CHECKPOINT), methods="hivtp", ratios="1/2", questions=6, output=tmp_path / "evaluation")
    settings = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["settings"]["hivtp"]
    assert settings["importance_start_layer"] == named.importance_start_layer


@pytest.mark.nightly
def test_it_sees(metrics):
    assert {of_type for _, _, of_type in metrics} == {"all", *QUESTION_TYPES}
    assert metrics["none", 1.0, "all"].n == 240
    assert metrics["none", 1.0, "all"].accuracy >= 0.8
    assert metrics["none", 1.0, "colour"].accuracy >= 0.9


@pytest.mark.nightly
def test_it_needs_the_tokens(metrics):
    """Else a comparison of methods would say nothing."""
    unpruned = metrics["none", 1.0, "all"].accuracy
    assert metrics["random", 0.06, "all"].accuracy <= unpruned - 0.15
    assert metrics["random", 0.06, "all"].accuracy < metrics["random", 0.22, "all"].accuracy < unpruned
