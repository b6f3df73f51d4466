"""Any prompt and any model input that may be fed: as stock, with equal counts, or an error that says what is wrong.

After every case a good call on the same model and processor gives what it gave before.
"""

import numpy as np
import pytest
import torch

from fed import ONLY, PROMPT, cases_by_family
from tiny_models import image_inputs, photo

SMALL, LARGE = photo(60, 100), photo(112, 112, seed=1)


# name: (images, text)
WORKING_PROMPTS = {
    "no image": (None, "What is shown?"),
    "only an image": (SMALL, "<image>"),
    "only images": ([SMALL, LARGE], "<image><image>"),
    "an image at the end": (SMALL, "What is shown in <image>"),
    "no space around": (SMALL, "before<image>after"),
    "a row without an image": ([SMALL, LARGE], [PROMPT, "no image here", "<image>"]),
    "nested images": ([[SMALL], [LARGE, SMALL]], [PROMPT, "<image> and <image>"]),
    "an image token in a user's text, with a picture for it": ([SMALL, LARGE], PROMPT + " What does <image> mean?"),
    "looks like an image token": (SMALL, PROMPT + " <Image> <image > &lt;image&gt; <image"),
    "not ascii": (SMALL, "\u56fe\u50cf <image>\n\U0001f600\u0000 \u202e?"),
    "long": (SMALL, PROMPT + " and" * 300),
}


@pytest.mark.parametrize("name", WORKING_PROMPTS)
def test_prompts_that_work_as_stock_does(bench, name):
    bench.check_as_stock(*WORKING_PROMPTS[name])


# From transformers 5.23 the processor counts; before, the model does, which then says how many it got.
TOO_FEW = "should be the same as the number of images|the prompt has .* every image that the prompt names"
TOO_MANY = f"more <image> placeholders than there are images|{TOO_FEW}"
# name: (images, text, further settings, message)
REFUSED_PROMPTS = {
    "no placeholder": (SMALL, "What is shown?", {}, TOO_FEW),
    "too few placeholders": ([SMALL, LARGE], PROMPT, {}, TOO_FEW),
    "too few placeholders in a batch": ([SMALL, LARGE, SMALL], [PROMPT, PROMPT], {}, TOO_FEW),
    "too many placeholders": (SMALL, PROMPT + "<image>", {}, TOO_MANY),
    "too many placeholders in a batch": ([SMALL], [PROMPT, PROMPT], {}, TOO_MANY),
    "an image token in a user's text": (SMALL, PROMPT + " What does <image> mean?", {}, TOO_MANY),
    "placeholders cut by truncation": (SMALL, PROMPT, {"truncation": True, "max_length": 12}, "Mismatch in `image` token"),
    "all placeholders cut": (SMALL, "What is this <image>", {"truncation": True, "max_length": 2}, "Mismatch in `image` token"),
}


@pytest.mark.parametrize("name", REFUSED_PROMPTS)
def test_prompts_that_are_refused(bench, name):
    images, text, settings, message = REFUSED_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        bench.model(**bench.processor(images=images, text=text, return_tensors="pt", padding=True, **settings))


def test_an_image_token_without_any_image_is_what_stock_makes_of_it(bench):
    # An error from transformers 5.23 on, and one ordinary token before: the same for both processors and both models.
    text = "What does <image> mean?"
    try:
        bench.stock_processor(text=text, return_tensors="pt")
    except ValueError:
        with pytest.raises(ValueError, match="Found 1 <image> tokens in the text but no images were passed"):
            bench.processor(text=text, return_tensors="pt")
    else:
        inputs = bench.check_as_stock(None, text)
        assert int((inputs.input_ids == bench.image_token).sum()) == 1


NOT_COUNTED = "the prompt has .* image placeholders, but the model keeps"


@pytest.mark.parametrize(
    "cut",
    [slice(0, 12), slice(12, None), slice(0, 8), slice(10, 11)],
    ids=["right", "left", "all but one", "a single one"],
)
def test_placeholders_that_were_cut_afterwards(bench, cut):
    inputs = bench.one_image()
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, cut], inputs["attention_mask"][:, cut]
    with pytest.raises(ValueError, match="do not truncate placeholders"):
        bench.model(**inputs)


def with_more_tiles(inputs, fill):
    pixels = inputs["pixel_values"]
    return {"pixel_values": torch.cat([pixels, torch.full_like(pixels[:, :2], fill)], dim=1)}


# Other ways to say the same: name: from the inputs of one image of 60 x 100 to the ones that differ.
SAME_PIXELS = {
    "pixels of double precision": lambda inputs: {"pixel_values": inputs["pixel_values"].double()},
    "pixels not contiguous": lambda inputs: {"pixel_values": inputs["pixel_values"].mT.contiguous().mT},
    "pixels that want a gradient": lambda inputs: {"pixel_values": inputs["pixel_values"].clone().requires_grad_()},
}
SAME = {
    "llava_next": {
        "sizes of int32": lambda inputs: {"image_sizes": inputs["image_sizes"].int()},
        "sizes of uint8": lambda inputs: {"image_sizes": inputs["image_sizes"].to(torch.uint8)},
        "sizes as an array": lambda inputs: {"image_sizes": inputs["image_sizes"].numpy()},
        "sizes as a list": lambda inputs: {"image_sizes": inputs["image_sizes"].tolist()},
        "sizes as a list of tuples": lambda inputs: {"image_sizes": [(60, 100)]},
        "sizes as a tuple": lambda inputs: {"image_sizes": ((60, 100),)},
        "sizes as a list of tensors": lambda inputs: {"image_sizes": list(inputs["image_sizes"])},
        "more tiles than needed": lambda inputs: with_more_tiles(inputs, 0.0),
        "more tiles than needed, of anything": lambda inputs: with_more_tiles(inputs, torch.nan),
        "four dimensions": lambda inputs: {"pixel_values": inputs["pixel_values"][0]},
        **SAME_PIXELS,
    },
    "llava": SAME_PIXELS,
}


@cases_by_family(SAME)
def test_inputs_that_say_the_same_give_the_same(bench, name):
    inputs = bench.one_image()
    logits = bench.check_model(inputs)
    assert torch.equal(bench.check_model({**inputs, **SAME[bench.family.name][name](inputs)}), logits)


@ONLY["llava_next"]
def test_images_without_padding_between_them(bench):
    """Tiles of several images in four dimensions, as stock takes them: each image's own, none added."""
    sizes = [(60, 100), (40, 56)]
    inputs = bench.processor(
        images=[photo(*size) for size in sizes], text=["<image>", "<image>"], return_tensors="pt", padding=True
    )
    tiles = [bench.processor.token_layout(*size).num_tiles for size in sizes]
    assert tiles[0] != tiles[1]
    packed = torch.cat([pixels[:number] for pixels, number in zip(inputs.pixel_values, tiles, strict=True)])
    logits = bench.check_model(inputs)
    assert torch.equal(bench.check_model({**inputs, "pixel_values": packed}), logits)


def test_placeholders_given_as_embeddings(bench):
    inputs = bench.one_image()
    logits = bench.check_model(inputs)
    embeddings = bench.model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        assert torch.equal(bench.model(inputs_embeds=embeddings, **inputs).logits, logits)


def sizes(*values, dtype=torch.int64):
    return {"image_sizes": torch.tensor(values, dtype=dtype)}


NOT_A_SIZE = "must be a whole number of pixels from 1"
NOT_PAIRS = r"`image_sizes` is .*must be \(height, width\)"
# Inputs that differ from the good ones of one image of 60 x 100: name: (what differs, piece of the error's message)
REFUSED = {
    "llava_next": {
        "no sizes": ({"image_sizes": None}, "without `image_sizes`"),
        "another size": (sizes([112, 112]), NOT_COUNTED),
        "a much larger size": (sizes([600, 100]), NOT_COUNTED),
        "width and height swapped": (sizes([100, 60]), NOT_COUNTED),
        "negative height": (sizes([-60, 100]), f"`height` is -60 .*{NOT_A_SIZE}"),
        "negative width": (sizes([60, -100]), f"`width` is -100 .*{NOT_A_SIZE}"),
        "zero": (sizes([60, 0]), f"`width` is 0 .*{NOT_A_SIZE}"),
        "beyond any picture": (sizes([2**62, 100]), f"`height` is {2**62} .*{NOT_A_SIZE} to"),
        "floats": (sizes([60, 100], dtype=torch.float32), rf"`height` is 60.0 \(float\).*{NOT_A_SIZE}"),
        "half precision": (sizes([60, 100], dtype=torch.float16), f"`height` is 60.0 .*{NOT_A_SIZE}"),
        "nan": (sizes([torch.nan, 100], dtype=torch.float32), f"`height` is nan .*{NOT_A_SIZE}"),
        "booleans": (sizes([True, True], dtype=torch.bool), f"`height` is True .*{NOT_A_SIZE}"),
        "strings": ({"image_sizes": [["60", "100"]]}, f"`height` is '60' .*{NOT_A_SIZE}"),
        "nothing": ({"image_sizes": [[None, None]]}, f"`height` is None .*{NOT_A_SIZE}"),
        "one number": ({"image_sizes": torch.tensor(60)}, NOT_PAIRS),
        "a size without its image": ({"image_sizes": torch.tensor([60, 100])}, NOT_PAIRS),
        "three numbers": (sizes([60, 100, 3]), NOT_PAIRS),
        "an array of floats": ({"image_sizes": np.array([[60.0, 100.0]])}, f"`height` is 60.0 .*{NOT_A_SIZE}"),
        "no size": ({"image_sizes": torch.zeros(0, 2, dtype=torch.int64)}, "holds 1 images .* names 0 images"),
        "two sizes": (sizes([60, 100], [60, 100]), "holds 1 images .* names 2 images"),
        "fewer tiles than needed": ({"pixel_values": torch.zeros(1, 4, 3, 56, 56)}, "images of 4 tiles.* up to 5 tiles"),
        "two images": ({"pixel_values": torch.zeros(2, 5, 3, 56, 56)}, "holds 2 images .* names 1 images"),
        "three dimensions": ({"pixel_values": torch.zeros(3, 56, 56)}, "4 or 5 dimensions"),
        "six dimensions": ({"pixel_values": torch.zeros(1, 1, 5, 3, 56, 56)}, "4 or 5 dimensions"),
        "tiles of another size": ({"pixel_values": torch.zeros(1, 5, 3, 64, 64)}, r"Input image size \(64\*64\) doesn't match"),
    },
    "llava": {
        "sizes, which it does not take": (sizes([60, 100]), "`image_sizes` was given, which LLaVA-1.5 does not take"),
        "two images": ({"pixel_values": torch.zeros(2, 3, 56, 56)}, "the prompt has 16 .* keeps 32 visual tokens"),
        "no image": ({"pixel_values": torch.zeros(0, 3, 56, 56)}, "`pixel_values` holds no image"),
        "three dimensions": ({"pixel_values": torch.zeros(3, 56, 56)}, "has 3 dimensions; it must have 4"),
        "five dimensions": ({"pixel_values": torch.zeros(1, 5, 3, 56, 56)}, "has 5 dimensions; it must have 4"),
        "tiles of another size": ({"pixel_values": torch.zeros(1, 3, 64, 64)}, r"Input image size \(64\*64\) doesn't match"),
    },
}


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@cases_by_family(REFUSED)
def test_inputs_that_are_refused(bench, name, generate):
    change, message = REFUSED[bench.family.name][name]
    inputs = {**bench.one_image(), **change}
    with pytest.raises(ValueError, match=message):
        bench.model.generate(**inputs, max_new_tokens=2) if generate else bench.model(**inputs)


NO_TENSOR = {
    "pixels as a list": ({"pixel_values": [torch.zeros(5, 3, 56, 56)]}, ValueError, "is a list; it must be a tensor"),
    "pixels as an array": ({"pixel_values": np.zeros((1, 5, 3, 56, 56))}, ValueError, "is a ndarray; it must be a tensor"),
}
ONE_CHANNEL = "to have 3 channels, but got 1 channels"
# Where stock speaks first, in words of its own: name: (what differs, types of the error, piece of its message)
REFUSED_BY_TYPE_OR_STOCK = {
    "llava_next": {
        "fewer tiles, four dimensions": (
            {"pixel_values": torch.zeros(4, 3, 56, 56)},
            ValueError,
            "holds 4 tiles; the 1 images",
        ),
        "more tiles, four dimensions": ({"pixel_values": torch.zeros(6, 3, 56, 56)}, ValueError, "holds 6 tiles; the 1 images"),
        "one channel": ({"pixel_values": torch.zeros(1, 5, 1, 56, 56)}, RuntimeError, ONE_CHANNEL),
        "sizes on another device": (
            {"image_sizes": torch.ones(1, 2, dtype=torch.int64, device="meta")},
            NotImplementedError,
            "Cannot copy out of meta tensor",
        ),
        **NO_TENSOR,
    },
    "llava": {"one channel": ({"pixel_values": torch.zeros(1, 1, 56, 56)}, RuntimeError, ONE_CHANNEL), **NO_TENSOR},
}


@cases_by_family(REFUSED_BY_TYPE_OR_STOCK)
def test_inputs_of_another_kind_are_refused(bench, name):
    change, error, message = REFUSED_BY_TYPE_OR_STOCK[bench.family.name][name]
    with pytest.raises(error, match=message):
        bench.model(**{**bench.one_image(), **change})


def batch(bench, pictures, texts):
    return bench.processor(images=pictures, text=texts, return_tensors="pt", padding=True)


def test_a_batch_with_an_image_too_few(bench):
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs |= {name: value[:1] for name, value in image_inputs(inputs).items()}
    with pytest.raises(ValueError, match=NOT_COUNTED):
        bench.model(**inputs)


def test_a_batch_with_a_prompt_too_few(bench):
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][1:], inputs["attention_mask"][1:]
    with pytest.raises(ValueError, match=NOT_COUNTED):
        bench.model(**inputs)


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@ONLY["llava_next"]
def test_images_in_another_order_than_the_prompts(bench, generate):
    # The sums are equal, and stock would fill the first prompt with the second image.
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs["pixel_values"], inputs["image_sizes"] = inputs["pixel_values"].flip(0), inputs["image_sizes"].flip(0)
    with pytest.raises(ValueError, match=r"in its order") as error:
        bench.model.generate(**inputs, max_new_tokens=2) if generate else bench.model(**inputs)
    small, large = (bench.processor.token_layout(*size).num_retained for size in [(60, 100), (112, 112)])
    assert f"{small} placeholders, {large} features" in str(error.value)


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_ratios_in_another_order_than_the_prompts(bench, generate):
    inputs = bench.processor(
        images=[SMALL, SMALL], text=[PROMPT, PROMPT], return_tensors="pt", padding=True, retention_ratio=[0.25, 0.5]
    )
    inputs["retention_ratio"] = inputs["retention_ratio"].flip(0)
    with pytest.raises(ValueError, match=r"in its order") as error:
        bench.model.generate(**inputs, max_new_tokens=2) if generate else bench.model(**inputs)
    fewer, more = (bench.processor.token_layout(60, 100, retention_ratio=ratio).num_retained for ratio in (0.25, 0.5))
    assert f"{fewer} placeholders, {more} features" in str(error.value)


@ONLY["llava_next"]
def test_what_cannot_be_told_apart(bench):
    """A model sees placeholders and sizes, nothing else: where these fit each other, it cannot know that they are wrong.

    Without newlines, a picture and the same turned on its side keep equally many tokens; so do two pictures of one size.
    Such inputs run, and this test says so.
    """
    upright, turned = bench.one_image((60, 100)), bench.one_image((100, 60))
    assert (upright["input_ids"] == 3).sum() != (turned["input_ids"] == 3).sum()
    settings = bench.model.config.pruning_config
    without_newlines = settings.replace(keep_newlines=False)
    try:
        bench.model.config.pruning_config = bench.processor.pruning_config = without_newlines
        upright, turned = bench.one_image((60, 100)), bench.one_image((100, 60))
        assert torch.equal(upright["input_ids"], turned["input_ids"])
        with torch.no_grad():
            right = bench.model(**upright).logits
            wrong = bench.model(**{**upright, "image_sizes": turned["image_sizes"]}).logits
        assert right.shape == wrong.shape
        assert not torch.equal(right, wrong)
    finally:
        bench.model.config.pruning_config = bench.processor.pruning_config = settings


@ONLY["llava"]
def test_pictures_in_another_order_cannot_be_told_apart(bench):
    """All pictures keep equally many tokens, so the model cannot know; such inputs run as in stock, and this test says so."""
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    with torch.no_grad():
        right = bench.model(**inputs).logits
        wrong = bench.model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert torch.equal(right.flip(0), wrong)
    assert not torch.equal(right, wrong)


# What a call may say of its images that leaves their numbers of tokens as they are.
ANNOUNCED = {
    "llava_next": {"padding": {"do_pad": False}, "size": {"size": {"shortest_edge": 56}}},
    "llava": {
        "padding": {"do_pad": False},
        "size": {"size": {"shortest_edge": 112}},
        "crop": {"crop_size": {"height": 56, "width": 56}},
    },
}


@cases_by_family(ANNOUNCED)
def test_announcing_counts_changes_no_defaults(bench, name):
    # Before transformers 5.23 stock's own method writes what it is given into defaults of its class.
    given = ANNOUNCED[bench.family.name][name]
    before = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)])["num_image_tokens"]
    for settings in (given, {"images_kwargs": given}):
        announced = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], **settings)
        assert announced["num_image_tokens"] == before


@ONLY["llava_next"]
def test_announcing_counts_for_tiles_that_do_not_divide(bench):
    with pytest.raises(ValueError, match="does not divide into tiles of 112 pixels"):
        bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], size={"shortest_edge": 112})


@ONLY["llava"]
def test_announcing_counts_for_larger_tiles(bench):
    larger = {"height": 112, "width": 112}
    announced = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], crop_size=larger)
    assert announced["num_image_tokens"] == [64]
    assert bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)])["num_image_tokens"] == [16]
