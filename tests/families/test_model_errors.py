"""What does not fit is said, with the numbers and the fix, before the language model runs."""

import pytest
import torch

from families import FAMILIES
from hivtp_hf import HIVTPLlavaConfig, HIVTPLlavaNextModel
from tiny_checkpoint import tiny_config
from tiny_models import LOW_RATIO, SIGLIP, SMALL, TOWERS, image_inputs, photo, pruned_config, twins

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return twins(LOW_RATIO, family=request.param)


def never(*args, **kwargs):
    raise AssertionError("the language model ran")


@pytest.fixture
def no_language_model(pair, monkeypatch):
    monkeypatch.setattr(pair.pruned.model.language_model, "forward", never)


@pytest.mark.usefixtures("no_language_model")
def test_stock_placeholders_are_refused_per_image(pair):
    sizes = [(60, 100), (112, 112)]
    inputs = pair.stock_processor(images=[photo(*size) for size in sizes], text=[PROMPT + " <image>"], return_tensors="pt")
    stock = [pair.processor.token_layout(*size).num_stock for size in sizes]
    kept = [pair.processor.token_layout(*size).num_retained for size in sizes]
    with pytest.raises(ValueError, match=r"^the prompt has") as error:
        pair.pruned(**inputs)
    message = str(error.value)
    assert f"{sum(stock)} image placeholders" in message
    assert f"keeps {sum(kept)} visual tokens" in message
    for image, size in enumerate(sizes):
        sized = " ({} x {})".format(*size) if pair.family.name == "llava_next" else ""  # which LLaVA-1.5 does not know
        assert f"image {image}{sized}: {stock[image]} placeholders, {kept[image]} features" in message
    assert "retention_ratio=0.25" in message
    assert f"`{pair.family.processor.__name__}`" in message
    assert "pruning_config=model.config.pruning_config" in message
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned.model(**inputs)


@pytest.mark.usefixtures("no_language_model")
def test_only_the_image_of_another_ratio_is_named(pair):
    asked = {"images": [photo(60, 100), photo(112, 112)], "text": ["<image> and <image>"], "return_tensors": "pt"}
    inputs = pair.processor(**asked, retention_ratio=[0.25, 0.5])
    inputs["retention_ratio"] = pair.processor(**asked, retention_ratio=[0.25, 0.75])["retention_ratio"]
    placeholders, features = (
        pair.processor.token_layout(112, 112, retention_ratio=ratio).num_retained for ratio in (0.5, 0.75)
    )
    with pytest.raises(ValueError, match=f"{placeholders} placeholders, {features} features") as error:
        pair.pruned(**inputs)
    assert "retention_ratio 0.75)" in str(error.value)
    assert "image 0" not in str(error.value)


@pytest.mark.usefixtures("no_language_model")
def test_images_in_another_order_than_the_prompts_are_refused(pair):
    """The sums are equal, so that nothing but the runs of placeholders tells."""
    images = [photo(60, 100), photo(112, 112)]
    asked = {"images": images, "text": ["<image> and <image>"], "return_tensors": "pt", "retention_ratio": [0.25, 0.5]}
    inputs = pair.processor(**asked)
    for name in (*image_inputs(inputs), "retention_ratio"):
        inputs[name] = inputs[name].flip(0)
    with pytest.raises(ValueError, match="in its order") as error:
        pair.pruned(**inputs)
    assert "image 0" in str(error.value)
    assert "image 1" in str(error.value)


@pytest.mark.usefixtures("no_language_model")
def test_placeholders_given_as_embeddings_are_counted_too(pair):
    inputs = pair.stock_processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    embeddings = pair.pruned.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="the prompt has"):
        pair.pruned(inputs_embeds=embeddings, **inputs)


def test_truncated_placeholders_are_refused(pair):
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :12], inputs["attention_mask"][:, :12]
    with pytest.raises(ValueError, match=r"processor\.pruning_config = model\.config\.pruning_config.*truncation") as error:
        pair.pruned(**inputs)
    assert str(error.value).startswith("Image features and image tokens do not match: the prompt has")  # what TRL looks for


OF_BOTH_FAMILIES = [
    (
        {"vision_layers": 8},
        {"retention_ratio": 1.0},
        "layers 6 to 8, but the vision tower has 8 layers, 0 to 7.*"
        r"`importance_start_layer` \(given: None\), `importance_num_layers` \(given: None\)",
    ),
    ({}, {"importance_num_layers": 10**30}, "10 layers"),
    (SIGLIP, {"method": "cls_attention"}, "'cls_attention' reads .* the vision tower has no class token.*'hivtp', 'hiprune'"),
]


@pytest.mark.parametrize(
    ("geometry", "pruning", "message"),
    [
        *(({"family": family, **geometry}, *rest) for family in FAMILIES for geometry, *rest in OF_BOTH_FAMILIES),
        ({"family": "llava_next", "patch_size": 57}, {}, "56 pixels is smaller than a patch of 57 pixels"),
        ({"family": "llava_next", "pinpoints": [[56, 100]]}, {}, "does not divide into tiles of 56 pixels"),
    ],
)
def test_settings_that_do_not_fit_the_tower_are_refused_at_construction(geometry, pruning, message):
    config = pruned_config(tiny_config(**{**SMALL, **geometry}), pruning)
    with pytest.raises(ValueError, match=message):
        FAMILIES[geometry["family"]].model(config)


def test_a_tower_without_one_tile_size_is_refused():
    """LLaVA-1.5 also means Pixtral in transformers, whose images vary in size."""
    with pytest.raises(ValueError, match=r"Pixtral.* pruning needs one square tile"):
        FAMILIES["llava"].model(HIVTPLlavaConfig(vision_config={"model_type": "pixtral"}))


@pytest.mark.parametrize(
    ("vision_type", "strategy", "message"),
    [
        ("clip_vision_model", "full", "is 'full', but the vision tower has a class token.*use 'default'"),
        ("siglip_vision_model", "default", "is 'default', but the vision tower has no class token.*use 'full'"),
    ],
)
def test_a_feature_selection_that_is_not_one_per_cell_is_refused(vision_type, strategy, message):
    """By LLaVA-NeXT, which un-pads a grid; LLaVA-1.5 takes both, as stock does."""
    config = pruned_config(tiny_config(**SMALL, vision_type=vision_type), {})
    model = HIVTPLlavaNextModel(config)
    pixel_values, image_sizes = torch.zeros(1, 5, 3, 56, 56), torch.tensor([[112, 112]])
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixel_values, image_sizes, vision_feature_select_strategy=strategy)
    config.vision_feature_select_strategy = strategy
    with pytest.raises(ValueError, match=message):
        HIVTPLlavaNextModel(config)


def test_an_unknown_feature_selection_is_refused():
    """By LLaVA-1.5."""
    pair = twins(LOW_RATIO, family="llava")
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    with pytest.raises(ValueError, match="is 'cls'; it must be 'default' or 'full'"):
        pair.pruned(**inputs, vision_feature_select_strategy="cls")


@pytest.mark.parametrize(
    ("tower", "other", "placeholders", "features"),
    [("CLIP", "full", 64, 65), ("CLIP, full", "default", 65, 64), ("SigLIP", "default", 64, 63)],
)
def test_a_feature_selection_that_counts_otherwise_than_the_processor_is_refused(tower, other, placeholders, features):
    """LLaVA-1.5 has a token more or less under the other one."""
    pair = twins({"retention_ratio": 1}, **TOWERS[f"LLaVA-1.5, {tower}"])
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    with pytest.raises(ValueError, match=f"has {placeholders} image placeholders, but the model keeps {features} visual"):
        pair.pruned(**inputs, vision_feature_select_strategy=other)


@pytest.mark.parametrize(("settings", "message"), [({"importance_start_layer": 9}, "10 layers"), ({"layer": 10}, "0 to 9")])
def test_settings_changed_after_construction_are_checked_at_the_call(pair, settings, message, monkeypatch):
    method = {"method": "cls_attention"} if "layer" in settings else {}
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    monkeypatch.setattr(pair.pruned.config, "pruning_config", {**method, **settings})
    with pytest.raises(ValueError, match=message):
        pair.pruned.model.get_image_features(**image_inputs(inputs))
