"""Any prompt and any model input that may be fed: as stock, with equal counts, or an error that says what is wrong.

After every case a good call on the same model and processor gives what it gave before.
"""

import numpy as np
import pytest
import torch

from fed import PROMPT
from tiny_models import photo

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


# From transformers 5.23 the processor counts; on 5.6 the model does, which then says how many it got.
TOO_FEW = "should be the same as the number of images|the prompt has .* pass every image"
TOO_MANY = "should be the same as the number of images|more <image> placeholders than there are images"
# name: (images, text, further settings, message)
REFUSED_PROMPTS = {
    "no placeholder": (SMALL, "What is shown?", {}, TOO_FEW),
    "too few placeholders": ([SMALL, LARGE], PROMPT, {}, TOO_FEW),
    "too few placeholders in a batch": ([SMALL, LARGE, SMALL], [PROMPT, PROMPT], {}, TOO_FEW),
    "too many placeholders": (SMALL, PROMPT + "<image>", {}, TOO_MANY),
    "too many placeholders in a batch": ([SMALL], [PROMPT, PROMPT], {}, TOO_MANY),
    "an image token in a user's text": (SMALL, PROMPT + " What does <image> mean?", {}, TOO_MANY),
    "placeholders cut by truncation": (SMALL, PROMPT, {"truncation": True, "max_length": 20}, "Mismatch in `image` token"),
    "all placeholders cut": (SMALL, "What is this <image>", {"truncation": True, "max_length": 2}, "Mismatch in `image` token"),
}


@pytest.mark.parametrize("name", REFUSED_PROMPTS)
def test_prompts_that_are_refused(bench, name):
    images, text, settings, message = REFUSED_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        bench.model(**bench.processor(images=images, text=text, return_tensors="pt", padding=True, **settings))


def test_an_image_token_without_any_image_is_what_stock_makes_of_it(bench):
    # An error from transformers 5.23 on, and one ordinary token on 5.6: the same for both processors and both models.
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


def test_the_word_that_transformers_uses_for_itself(bench):
    # transformers 5.6 turns "<placeholder>" in a user's text into one more image token; the model counts it.
    text = PROMPT + " What does <placeholder> mean?"
    inputs = bench.processor(images=SMALL, text=text, return_tensors="pt")
    surplus = int((inputs.input_ids == bench.image_token).sum()) - bench.processor.token_layout(60, 100).num_retained
    if surplus:
        with pytest.raises(ValueError, match=NOT_COUNTED):
            bench.model(**inputs)
    else:
        bench.check_as_stock(SMALL, text)


@pytest.mark.parametrize(
    "cut",
    [slice(0, 20), slice(20, None), slice(0, 8), slice(10, 11)],
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
SAME = {
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
    "pixels of double precision": lambda inputs: {"pixel_values": inputs["pixel_values"].double()},
    "pixels not contiguous": lambda inputs: {"pixel_values": inputs["pixel_values"].mT.contiguous().mT},
    "pixels that want a gradient": lambda inputs: {"pixel_values": inputs["pixel_values"].clone().requires_grad_()},
}


@pytest.mark.parametrize("name", SAME)
def test_inputs_that_say_the_same_give_the_same(bench, name):
    inputs = bench.one_image()
    logits = bench.check_model(inputs)
    assert torch.equal(bench.check_model({**inputs, **SAME[name](inputs)}), logits)


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
}


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_are_refused(bench, name, generate):
    change, message = REFUSED[name]
    inputs = {**bench.one_image(), **change}
    with pytest.raises(ValueError, match=message):
        bench.model.generate(**inputs, max_new_tokens=2) if generate else bench.model(**inputs)


# Where stock speaks first, in words of its own: name: (what differs, types of the error, piece of its message)
REFUSED_BY_TYPE_OR_STOCK = {
    "fewer tiles, four dimensions": ({"pixel_values": torch.zeros(4, 3, 56, 56)}, ValueError, "holds 4 tiles; the 1 images"),
    "more tiles, four dimensions": ({"pixel_values": torch.zeros(6, 3, 56, 56)}, ValueError, "holds 6 tiles; the 1 images"),
    "pixels as a list": ({"pixel_values": [torch.zeros(5, 3, 56, 56)]}, ValueError, "is a list; it must be a tensor"),
    "pixels as an array": ({"pixel_values": np.zeros((1, 5, 3, 56, 56))}, ValueError, "is a ndarray; it must be a tensor"),
    "one channel": ({"pixel_values": torch.zeros(1, 5, 1, 56, 56)}, RuntimeError, "to have 3 channels, but got 1 channels"),
    "sizes on another device": (
        {"image_sizes": torch.ones(1, 2, dtype=torch.int64, device="meta")},
        NotImplementedError,
        "Cannot copy out of meta tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_TYPE_OR_STOCK)
def test_inputs_of_another_kind_are_refused(bench, name):
    change, error, message = REFUSED_BY_TYPE_OR_STOCK[name]
    with pytest.raises(error, match=message):
        bench.model(**{**bench.one_image(), **change})


def batch(bench, pictures, texts):
    return bench.processor(images=pictures, text=texts, return_tensors="pt", padding=True)


def test_a_batch_with_an_image_too_few(bench):
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs["pixel_values"], inputs["image_sizes"] = inputs["pixel_values"][:1], inputs["image_sizes"][:1]
    with pytest.raises(ValueError, match=NOT_COUNTED):
        bench.model(**inputs)


def test_a_batch_with_a_prompt_too_few(bench):
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][1:], inputs["attention_mask"][1:]
    with pytest.raises(ValueError, match=NOT_COUNTED):
        bench.model(**inputs)


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_images_in_another_order_than_the_prompts(bench, generate):
    # The sums are equal, and stock would fill the first prompt with the second image.
    inputs = batch(bench, [SMALL, LARGE], [PROMPT, PROMPT])
    inputs["pixel_values"], inputs["image_sizes"] = inputs["pixel_values"].flip(0), inputs["image_sizes"].flip(0)
    with pytest.raises(ValueError, match=r"in its order") as error:
        bench.model.generate(**inputs, max_new_tokens=2) if generate else bench.model(**inputs)
    small, large = (bench.processor.token_layout(*size).num_retained for size in [(60, 100), (112, 112)])
    assert f"{small} placeholders, {large} features" in str(error.value)


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


def test_announcing_counts_changes_no_defaults(bench):
    # On transformers 5.6 stock's own method writes what it is given into defaults of its class.
    before = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)])["num_image_tokens"]
    for settings in ({"do_pad": False}, {"size": {"shortest_edge": 56}}, {"images_kwargs": {"size": {"shortest_edge": 56}}}):
        announced = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], **settings)
        assert announced["num_image_tokens"] == before
    with pytest.raises(ValueError, match="does not divide into tiles of 112 pixels"):
        bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], size={"shortest_edge": 112})
