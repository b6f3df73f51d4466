"""TRL's trainers: a step of each way of training that docs/training.md names, and what is said where there is no way."""

import math

import pytest
import torch

from checkpoints import build_pruned_checkpoint
from families import FAMILIES
from tiny_models import LOW_RATIO, photo

trl = pytest.importorskip("trl", reason="these tests train with trl")
datasets = pytest.importorskip("datasets", reason="trl takes its rows from datasets")
peft = pytest.importorskip("peft", reason="these tests train adapters")

SIZES = [(60, 100), (112, 112), (200, 50)]
SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """A checkpoint of ours; the stock one that it was made of lies beside it."""
    return build_pruned_checkpoint(tmp_path_factory.mktemp(family.name), LOW_RATIO, family.name)


def loaded(family, folder):
    """Model and processor of ours, from a stock checkpoint or from one of ours."""
    return [part.from_pretrained(folder, pruning_config=LOW_RATIO) for part in (family.model, family.processor)]


def said(role, text):
    return [{"role": role, "content": text}]


def preferences():
    rows = [
        {"images": [photo(*SIZES[0])], "prompt": said("user", "What is shown?"), "chosen": said("assistant", "a cat")},
        {"images": [photo(*SIZES[1], 1)], "prompt": said("user", "How many?"), "chosen": said("assistant", "two cups")},
    ]
    return datasets.Dataset.from_list([{**row, "rejected": said("assistant", "No.")} for row in rows])


def preference_trainer(model, processor, folder, max_length=None, **keywords):
    settings = trl.DPOConfig(output_dir=str(folder), max_length=max_length, **SETTINGS)
    return trl.DPOTrainer(model, args=settings, train_dataset=preferences(), processing_class=processor, **keywords)


def assert_trains(trainer, loss):
    """One step begins at this loss and changes every weight that is trained and that the loss depends on."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


# DPO begins at log 2 where policy and reference are the same model; a reference that keeps other tokens begins elsewhere.
@pytest.mark.parametrize("kind", ["complete", "config-only"])
def test_preferences_from_a_saved_checkpoint(family, saved, tmp_path, kind):
    folder = saved
    if kind == "config-only":
        folder = tmp_path / "config_only"
        family.config.from_base_model(saved.parent / "stock_source", pruning_config=LOW_RATIO).save_pretrained(folder)
        family.processor.from_pretrained(saved).save_pretrained(folder)
    trainer = preference_trainer(family.model.from_pretrained(folder), family.processor.from_pretrained(folder), tmp_path)
    assert type(trainer.ref_model) is family.model
    assert trainer.ref_model.config.pruning_config == trainer.model.config.pruning_config
    assert_trains(trainer, math.log(2))


def test_preferences_with_a_reference_that_is_given(family, saved, tmp_path):
    stock = saved.parent / "stock_source"
    reference, _ = loaded(family, stock)
    assert_trains(preference_trainer(*loaded(family, stock), tmp_path, ref_model=reference), math.log(2))


def test_preferences_with_an_adapter(family, saved, tmp_path):
    adapter = peft.LoraConfig(target_modules=r".*language_model.*(q|v)_proj", r=4, task_type="CAUSAL_LM")
    trainer = preference_trainer(*loaded(family, saved.parent / "stock_source"), tmp_path, peft_config=adapter)
    assert trainer.ref_model is None
    assert_trains(trainer, math.log(2))


def test_preferences_from_a_stock_checkpoint_have_a_reference_that_is_not_pruned(family, saved, tmp_path):
    for max_length, message in (
        (1024, r"`max_length` \(1024\) is too short"),
        (None, "features and image tokens do not match"),
    ):
        trainer = preference_trainer(*loaded(family, saved.parent / "stock_source"), tmp_path, max_length)
        assert type(trainer.ref_model) is family.stock_model
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_preferences_that_are_cut_within_an_image_get_the_hint_of_trl(family, saved, tmp_path):
    trainer = preference_trainer(*loaded(family, saved), tmp_path, max_length=10)
    with pytest.raises(ValueError, match=r"`max_length` \(10\) is too short") as error:
        trainer.train()
    assert "Make the inputs with a processor of the same settings" in str(error.value.__cause__)


def test_rewards_with_a_divergence_from_a_saved_checkpoint(family, saved, tmp_path):
    """GRPO with a KL term asks for a reference in the same way, and takes none that is given."""
    model, processor = loaded(family, saved)
    settings = trl.GRPOConfig(output_dir=str(tmp_path), beta=0.1, num_generations=2, max_completion_length=4, **SETTINGS)
    rows = preferences().remove_columns(["chosen", "rejected"])
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [1.0, 0.0], args=settings, train_dataset=rows, processing_class=processor
    )
    assert type(trainer.ref_model) is family.model
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)


CONVERSATIONS = [("Is there a dog?", "No.", 0), ("What is shown?", "a cat", 1), ("How many?", "three cups", 2)]


def conversations():
    """Question, answer and images: none, one and two."""
    pictures = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    return [(question, answer, pictures[-number:] if number else []) for question, answer, number in CONVERSATIONS]


def supervised_trainer(model, processor, folder):
    settings = {**SETTINGS, "per_device_train_batch_size": 3, "max_length": None}
    rows = [
        {"messages": said("user", question) + said("assistant", answer), "images": images}
        for question, answer, images in conversations()
    ]
    args, rows = trl.SFTConfig(output_dir=str(folder), **settings), datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(model, args=args, train_dataset=rows, processing_class=processor)


def test_rows_with_no_one_and_two_images(family, saved, tmp_path):
    model, processor = loaded(family, saved)
    losses, predicted = [], []
    for question, answer, images in conversations():
        parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
        chat = said("user", parts) + said("assistant", [{"type": "text", "text": answer}])
        inputs = processor(text=processor.apply_chat_template(chat), images=images or None, return_tensors="pt")
        with torch.no_grad():
            losses.append(model(**inputs, labels=inputs.input_ids).loss.item())
        predicted.append(inputs.input_ids.shape[1] - 1)
    expected = sum(loss * number for loss, number in zip(losses, predicted, strict=True)) / sum(predicted)
    assert_trains(supervised_trainer(model, processor, tmp_path), expected)
