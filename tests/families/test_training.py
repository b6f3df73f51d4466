"""Training: losses, gradients and optimiser steps equal those of a stock model that reads the pruned sequence."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from tiny_models import LOW_RATIO, TOWERS, image_inputs, photo, pruned_config, twins

TEXTS = ["USER: <image>\nWhat is shown? ASSISTANT: a cat on a table", "USER: <image> How many? ASSISTANT: two"]
SIZES = [(60, 100), (112, 112)]


def training_inputs(processor, rows=(0, 1)):
    """A batch of images with labels on the text alone."""
    images, texts = [photo(*SIZES[row], seed=row) for row in rows], [TEXTS[row] for row in rows]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
    is_text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != processor.image_token_id)
    is_text[:, 0] = False  # nothing predicts it; the trainer would count it all the same
    return {**inputs, "labels": torch.where(is_text, inputs["input_ids"], -100)}


def kept_indices(model, inputs):
    return model.get_image_features(**image_inputs(inputs)).kept_indices


def oracle_inputs(stock, inputs, kept):
    """The pruned sequence as a stock model reads it: its own embeddings, with its own kept features in their places."""
    features = stock.get_image_features(**image_inputs(inputs)).pooler_output
    features = torch.cat([packed[indices] for packed, indices in zip(features, kept, strict=True)])
    embeddings = stock.get_input_embeddings()(inputs["input_ids"])
    placeholders = (inputs["input_ids"] == stock.config.image_token_id)[..., None]
    rest = {key: inputs[key] for key in ("attention_mask", "labels")}
    return {"inputs_embeds": embeddings.masked_scatter(placeholders, features), **rest}


def oracle_loss(pair, inputs):
    with torch.no_grad():
        kept = kept_indices(pair.pruned, inputs)
    return pair.stock(**oracle_inputs(pair.stock, inputs, kept)).loss


def parts_that_learn(pair):
    newline = ["image_newline"] if pair.family.name == "llava_next" else []
    return ["vision_tower", "multi_modal_projector", *newline]


def gradients(model):
    return {name: None if weight.grad is None else weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_tensors(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] is None) == (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(got[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def all_twins():
    return {tower: twins(LOW_RATIO, **geometry) for tower, geometry in TOWERS.items()}


@pytest.fixture(params=TOWERS)
def pair(all_twins, request):
    """Both kinds of tower: scores reach the collector by a keyword in one, by a context variable in the other."""
    pair = all_twins[request.param]
    for model in (pair.stock, pair.pruned):
        model.zero_grad()
        model.train()
    yield pair
    pair.pruned.gradient_checkpointing_disable()


@pytest.fixture(params=["LLaVA-NeXT, CLIP", "LLaVA-1.5, CLIP"])
def clip_pair(all_twins, request):
    """Copies whose weights a test may change."""
    pair = all_twins[request.param]
    stock, pruned = copy.deepcopy(pair.stock), copy.deepcopy(pair.pruned)
    for model in (stock, pruned):
        model.zero_grad()
    return replace(pair, stock=stock, pruned=pruned)


def test_loss_and_gradients_are_the_oracles(pair):
    inputs = training_inputs(pair.processor)
    loss, expected = pair.pruned(**inputs).loss, oracle_loss(pair, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    expected.backward()
    got = gradients(pair.pruned)
    assert_same_tensors(got, gradients(pair.stock), atol=1e-6, rtol=1e-4)
    for part in (*parts_that_learn(pair), "language_model.embed_tokens"):
        assert any(part in name and gradient is not None and gradient.any() for name, gradient in got.items()), part


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(pair, use_reentrant):
    inputs = training_inputs(pair.processor)
    pair.pruned(**inputs).loss.backward()
    expected = gradients(pair.pruned)
    expected_loss = oracle_loss(pair, inputs)
    pair.pruned.zero_grad()

    runs = []
    layer = next(module for module in pair.pruned.model.vision_tower.modules() if type(module).__name__.endswith("MLP"))
    # Before the layer: computing again stops where nothing more is needed, which may be before its end.
    hook = layer.register_forward_pre_hook(lambda *args: runs.append(len(args)))
    pair.pruned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    try:
        loss = pair.pruned(**inputs).loss
        loss.backward()
    finally:
        hook.remove()
    assert len(runs) == 2, "the layer was not computed again, so nothing was checkpointed"
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)
    assert_same_tensors(gradients(pair.pruned), expected, atol=1e-7, rtol=1e-5)


@pytest.fixture
def trainer(clip_pair, tmp_path):
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [0, 1]
    return Trainer(
        model=clip_pair.pruned,
        args=settings,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda numbers: training_inputs(clip_pair.processor, numbers),
    )


def test_one_step_of_the_trainer(clip_pair, trainer, tmp_path):
    inputs = training_inputs(clip_pair.processor, [0, 1])
    optimiser = torch.optim.SGD(clip_pair.stock.parameters(), lr=0.1)
    expected = oracle_loss(clip_pair, inputs)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    before = {name: weight.clone() for name, weight in clip_pair.stock.named_parameters()}
    optimiser.step()

    assert trainer.train().training_loss == pytest.approx(expected.item(), abs=1e-5)
    after = dict(clip_pair.pruned.named_parameters())
    for part in (*parts_that_learn(clip_pair), "lm_head"):
        assert any(part in name and not torch.equal(weight, before[name]) for name, weight in after.items()), part
    assert_same_tensors(after, dict(clip_pair.stock.named_parameters()), atol=1e-6, rtol=1e-5)

    trainer.save_model(tmp_path / "saved")
    again = clip_pair.family.model.from_pretrained(tmp_path / "saved")
    assert again.config.pruning_config == clip_pair.pruned.config.pruning_config
    assert_same_tensors(dict(again.named_parameters()), after, atol=0, rtol=0)


def answers(model, inputs):
    with torch.no_grad():
        kept = [indices.tolist() for indices in kept_indices(model, inputs)]
        return kept, model(**inputs).logits


# Adapters on the language model alone, as most do it, and in the tower too, where they change the scores. The tower's last
# layer, 9, is left out: LLaVA reads the features before it.
@pytest.mark.parametrize("targets", [r".*language_model.*(q|v)_proj", r".*layers\.[0-8]\..*(q|k|v)_proj"])
def test_a_lora_adapter_is_trained_saved_loaded_and_merged(clip_pair, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="the adapter tests need peft")
    inputs = training_inputs(clip_pair.processor)
    # In float64, as merging rounds the weights, and ten layers of sharp attention amplify that.
    clip_pair.pruned.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    untrained, fresh = copy.deepcopy(clip_pair.pruned), copy.deepcopy(clip_pair.pruned)
    model = peft.get_peft_model(clip_pair.pruned, peft.LoraConfig(target_modules=targets, r=4, lora_alpha=64))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at the start, so that nothing in the tower would change within one step
            weight.data.normal_(std=0.05)
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.clone() for name, weight in adapters.items()}
    loss = model(**inputs).loss
    loss.backward()
    assert all("lora" in name and weight.grad.any() for name, weight in adapters.items())
    torch.optim.SGD(adapters.values(), lr=0.1).step()
    assert not any(torch.equal(weight, before[name]) for name, weight in adapters.items())
    model.eval()
    kept, logits = answers(model, inputs)
    untrained_kept, untrained_logits = answers(untrained, inputs)
    assert (kept != untrained_kept) == ("language_model" not in targets)
    assert float((logits - untrained_logits).abs().max()) > 0.1

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    loaded_kept, loaded_logits = answers(loaded, inputs)
    assert loaded_kept == kept
    assert torch.equal(loaded_logits, logits)

    merged = loaded.merge_and_unload()
    assert type(merged) is clip_pair.family.model
    merged_kept, merged_logits = answers(merged, inputs)
    assert merged_kept == kept
    torch.testing.assert_close(merged_logits, logits, atol=1e-6, rtol=0)


def test_an_adapter_loads_with_its_model_once_the_package_is_allowed(clip_pair, tmp_path):
    peft = pytest.importorskip("peft", reason="the adapter tests need peft")
    clip_pair.pruned.save_pretrained(tmp_path / "model")
    clip_pair.processor.save_pretrained(tmp_path / "adapter")  # or peft asks the Hub for a tokenizer
    model = clip_pair.family.model.from_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(target_modules=r".*language_model.*(q|v)_proj", r=4, init_lora_weights=False)
    model = peft.get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="import_allowlist"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hivtp_hf"]).eval()
    inputs = training_inputs(clip_pair.processor)
    assert type(loaded.get_base_model()) is clip_pair.family.model
    (kept, logits), expected = answers(loaded, inputs), answers(model, inputs)
    assert kept == expected[0]
    assert torch.equal(logits, expected[1])


def test_more_token_embeddings(clip_pair, tmp_path):
    inputs = training_inputs(clip_pair.processor)
    kept, logits = answers(clip_pair.pruned, inputs)
    clip_pair.pruned.resize_token_embeddings(408)
    clip_pair.stock.resize_token_embeddings(408)
    # A new token in the prompt: its row must reach the language model beside the images.
    with torch.no_grad():
        for model in (clip_pair.pruned, clip_pair.stock):
            model.get_input_embeddings().weight[400:] = 1.0
            model.get_output_embeddings().weight[400:] = 1.0
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 0] = 407
    resized_kept, resized_logits = answers(clip_pair.pruned, inputs)
    assert resized_kept == kept
    assert resized_logits.shape == (*logits.shape[:2], 408)
    with torch.no_grad():
        oracle = clip_pair.stock(**oracle_inputs(clip_pair.stock, inputs, kept))
    torch.testing.assert_close(resized_logits, oracle.logits, atol=1e-5, rtol=0)

    clip_pair.pruned.save_pretrained(tmp_path)
    again = clip_pair.family.model.from_pretrained(tmp_path)
    assert again.config.text_config.vocab_size == 408
    again_kept, again_logits = answers(again, inputs)
    assert again_kept == kept
    assert torch.equal(again_logits, resized_logits)


def test_tied_weights_stay_tied(clip_pair, tmp_path):
    config = pruned_config(clip_pair.stock.config, LOW_RATIO)
    config.tie_word_embeddings = True
    model = clip_pair.family.model(config).eval()
    weights = {name: weight for name, weight in clip_pair.stock.state_dict().items() if name != "lm_head.weight"}
    model.load_state_dict(weights, strict=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    clip_pair.stock.lm_head.weight = clip_pair.stock.get_input_embeddings().weight

    inputs = training_inputs(clip_pair.processor)
    loss = model(**inputs).loss
    expected = oracle_loss(clip_pair, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    expected.backward()
    assert_same_tensors(gradients(model), gradients(clip_pair.stock), atol=1e-6, rtol=1e-4)

    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "lm_head" in name or "embed_tokens" in name]) == 1  # noqa: SIM118
    again = clip_pair.family.model.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    kept, logits = answers(model, inputs)
    again_kept, again_logits = answers(again, inputs)
    assert again_kept == kept
    assert torch.equal(again_logits, logits)
