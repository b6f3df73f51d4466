"""What does not fit is said, with the numbers and the fix, before the language model runs."""

import pytest
import torch

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextModel
from tiny_checkpoint import tiny_config
from tiny_models import LOW_RATIO, SMALL, photo, pruned_config, twins

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@pytest.fixture(scope="module")
def pair():
    return twins(LOW_RATIO)


@pytest.fixture
def no_language_model(pair, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the language model ran")

    monkeypatch.setattr(pair.pruned.model.language_model, "forward", never)


@pytest.mark.usefixtures("no_language_model")
def test_stock_placeholders_are_refused_per_image(pair):
    images = [photo(60, 100), photo(112, 112)]
    inputs = pair.stock_processor(images=images, text=[PROMPT + " <image>"], return_tensors="pt")
    stock = [pair.processor.token_layout(*size).num_stock for size in [(60, 100), (112, 112)]]
    kept = [pair.processor.token_layout(*size).num_retained for size in [(60, 100), (112, 112)]]
    with pytest.raises(ValueError, match="the prompt has") as error:
        pair.pruned(**inputs)
    message = str(error.value)
    assert f"{sum(stock)} image placeholders" in message
    assert f"keeps {sum(kept)} visual tokens" in message
    assert f"image 0 (60 x 100): {stock[0]} placeholders, {kept[0]} features" in message
    assert f"image 1 (112 x 112): {stock[1]} placeholders, {kept[1]} features" in message
    assert "retention_ratio=0.25" in message
    assert "processor.pruning_config = model.config.pruning_config" in message
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned.model(**inputs)


@pytest.mark.usefixtures("no_language_model")
def test_only_the_image_that_differs_is_named(pair):
    inputs = pair.processor(images=[photo(60, 100), photo(112, 112)], text=["<image> and <image>"], return_tensors="pt")
    inputs["image_sizes"][1] = torch.tensor([112, 56])
    with pytest.raises(ValueError, match=r"image 1 \(112 x 56\)") as error:
        pair.pruned(**inputs)
    assert "image 0" not in str(error.value)


@pytest.mark.usefixtures("no_language_model")
def test_placeholders_given_as_embeddings_are_counted_too(pair):
    inputs = pair.stock_processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    embeddings = pair.pruned.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned(inputs_embeds=embeddings, **inputs)


def test_truncated_placeholders_are_refused(pair):
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :20], inputs["attention_mask"][:, :20]
    with pytest.raises(ValueError, match="truncation"):
        pair.pruned(**inputs)


def test_equal_counts_follow_the_models_settings(pair):
    # 1/4 of 64 cells is 16 by either rule, so the placeholders fit, and what is kept is the model's business.
    pair.processor.pruning_config = {"global_ratio": 0.0, "local_window": 2}
    try:
        inputs = pair.processor(images=photo(112, 112), text=PROMPT, return_tensors="pt")
    finally:
        pair.processor.pruning_config = LOW_RATIO
    assert torch.equal(inputs.input_ids, pair.processor(images=photo(112, 112), text=PROMPT, return_tensors="pt").input_ids)
    with torch.no_grad():
        assert pair.pruned(**inputs).logits.shape[1] == inputs.input_ids.shape[1]


@pytest.mark.parametrize("build", [HIVTPLlavaNextModel, HIVTPLlavaNextForConditionalGeneration])
@pytest.mark.parametrize(
    ("geometry", "pruning", "message"),
    [
        ({"vision_layers": 8}, {}, r"layers 6 to 8, but the vision tower has 8 layers, 0 to 7.*importance_start_layer"),
        ({"vision_layers": 8}, {"retention_ratio": 1.0}, "8 layers"),
        ({}, {"importance_num_layers": 10**30}, "10 layers"),
        ({"patch_size": 6}, {}, "56 pixels does not divide into patches of 6 pixels"),
        ({"pinpoints": [[56, 100]]}, {}, "does not divide into tiles of 56 pixels"),
    ],
)
def test_settings_that_do_not_fit_the_tower_are_refused_at_construction(build, geometry, pruning, message):
    config = pruned_config(tiny_config(**{**SMALL, **geometry}), pruning)
    with pytest.raises(ValueError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("vision_type", "strategy", "message"),
    [
        ("clip_vision_model", "full", "is 'full', but the vision tower has a class token.*use 'default'"),
        ("siglip_vision_model", "default", "is 'default', but the vision tower has no class token.*use 'full'"),
    ],
)
def test_a_feature_selection_that_is_not_one_per_cell_is_refused(vision_type, strategy, message):
    config = pruned_config(tiny_config(**SMALL, vision_type=vision_type), {})
    model = HIVTPLlavaNextModel(config)
    pixel_values, image_sizes = torch.zeros(1, 5, 3, 56, 56), torch.tensor([[112, 112]])
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixel_values, image_sizes, vision_feature_select_strategy=strategy)
    config.vision_feature_select_strategy = strategy
    with pytest.raises(ValueError, match=message):
        HIVTPLlavaNextModel(config)


def test_settings_changed_after_construction_are_checked_at_the_call(pair):
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    try:
        for settings, message in [({"importance_start_layer": 9}, "10 layers"), ({"importance_num_layers": 5}, "6 to 10")]:
            pair.pruned.config.pruning_config = settings
            with pytest.raises(ValueError, match=message):
                pair.pruned.model.get_image_features(inputs.pixel_values, inputs.image_sizes)
        with pytest.raises(ValueError, match="`retention_ratio` is 7"):
            pair.pruned.config.pruning_config = {"retention_ratio": 7}
    finally:
        pair.pruned.config.pruning_config = LOW_RATIO


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": None}, "without `image_sizes`"),
        ({"image_sizes": torch.tensor([[60, 100], [60, 100]])}, "1 images of .* names 2 images"),
        ({"image_sizes": torch.tensor([60, 100])}, "must be \\(height, width\\)"),
        ({"image_sizes": torch.tensor([[0, 100]])}, "`height` is 0"),
        ({"pixel_values": torch.zeros(1, 2, 3, 56, 56)}, "images of 2 tiles"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_refused(pair, change, message):
    inputs = {"pixel_values": torch.zeros(1, 5, 3, 56, 56), "image_sizes": torch.tensor([[60, 100]]), **change}
    with pytest.raises(ValueError, match=message):
        pair.pruned.model.get_image_features(**inputs)
