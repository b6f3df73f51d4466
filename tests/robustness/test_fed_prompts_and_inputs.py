"""Any prompt and any model input that may be fed: as stock, with equal counts, or an error that says what is wrong.

After every case a good call on the same model and processor gives what it gave before.
"""

import numpy as np
import pytest
import torch

from fed import ONLY, PROMPT, cases_by_family
from tiny_models import photo, settings

SMALL, LARGE = photo(60, 100), photo(112, 112, seed=1)

# name: (images, text)
WORKING_PROMPTS = {
    "no image": (None, "What is shown?"),
    "only images": ([SMALL, LARGE], "<image><image>"),
    "an image token in a user's text, with a picture for it": ([SMALL, LARGE], PROMPT + " What does <image> mean?"),
    "looks like an image token": (SMALL, PROMPT + " <Image> <image > &lt;image&gt; <image"),
    "not ascii": (SMALL, "\u56fe\u50cf <image>\n\U0001f600\u0000 \u202e?"),
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
    "too few placeholders in a batch": ([SMALL, LARGE, SMALL], [PROMPT, PROMPT], {}, TOO_FEW),
    "too many placeholders in a batch": ([SMALL], [PROMPT, PROMPT], {}, TOO_MANY),
    "placeholders cut by truncation": (SMALL, PROMPT, {"truncation": True, "max_length": 12}, "Mismatch in `image` token"),
}


@pytest.mark.parametrize("name", REFUSED_PROMPTS)
def test_prompts_that_are_refused(bench, name):
    images, text, settings, message = REFUSED_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        bench.model(**bench.processor(images=images, text=text, return_tensors="pt", padding=True, **settings))


def with_more_tiles(inputs):
    pixels = inputs["pixel_values"]
    return {"pixel_values": torch.cat([pixels, torch.full_like(pixels[:, :2], torch.nan)], dim=1)}


# Other ways to say the same: name: from the inputs of one image of 60 x 100 to the ones that differ.
SAME_PIXELS = {
    "pixels of double precision": lambda inputs: {"pixel_values": inputs["pixel_values"].double()},
    "pixels not contiguous": lambda inputs: {"pixel_values": inputs["pixel_values"].mT.contiguous().mT},
}
SAME = {
    "llava_next": {
        "sizes of int32": lambda inputs: {"image_sizes": inputs["image_sizes"].int()},
        "sizes as an array": lambda inputs: {"image_sizes": inputs["image_sizes"].numpy()},
        "sizes as a list of tuples": lambda inputs: {"image_sizes": [(60, 100)]},
        "sizes as a list of tensors": lambda inputs: {"image_sizes": list(inputs["image_sizes"])},
        "more tiles than needed, of anything": with_more_tiles,
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
    inputs = bench.good_inputs()
    tiles = [bench.processor.token_layout(*size).num_views for size in bench.sizes(inputs)]
    assert tiles[0] != tiles[1]
    packed = torch.cat([pixels[:number] for pixels, number in zip(inputs.pixel_values, tiles, strict=True)])
    logits = bench.check_model(inputs)
    assert torch.equal(bench.check_model({**inputs, "pixel_values": packed}), logits)


def sizes(*values, dtype=torch.int64):
    return {"image_sizes": torch.tensor(values, dtype=dtype)}


NOT_COUNTED = "the prompt has .* image placeholders, but the model keeps"
NOT_A_SIZE = "must be a whole number of pixels from 1"
NOT_PAIRS = r"`image_sizes` is .*must be \(height, width\)"
NO_TENSOR = {"pixels as an array": ({"pixel_values": np.zeros((1, 5, 3, 56, 56))}, "is a ndarray; it must be a tensor")}
# Inputs that differ from the good ones of one image of 60 x 100: name: (what differs, piece of the error's message)
REFUSED = {
    "llava_next": {
        "no sizes": ({"image_sizes": None}, "without `image_sizes`"),
        "width and height swapped": (sizes([100, 60]), NOT_COUNTED),
        "zero": (sizes([60, 0]), f"`width` is 0 .*{NOT_A_SIZE}"),
        "beyond any picture": (sizes([2**62, 100]), f"`height` is {2**62} .*{NOT_A_SIZE} to"),
        "floats": (sizes([60, 100], dtype=torch.float32), rf"`height` is 60.0 \(float\).*{NOT_A_SIZE}"),
        "one number": ({"image_sizes": torch.tensor(60)}, NOT_PAIRS),
        "a size without its image": ({"image_sizes": torch.tensor([60, 100])}, NOT_PAIRS),
        "three numbers": (sizes([60, 100, 3]), NOT_PAIRS),
        "no size": ({"image_sizes": torch.zeros(0, 2, dtype=torch.int64)}, "holds 1 images .* names 0 images"),
        "two sizes": (sizes([60, 100], [60, 100]), "holds 1 images .* names 2 images"),
        "fewer tiles than needed": ({"pixel_values": torch.zeros(1, 4, 3, 56, 56)}, "images of 4 tiles.* up to 5 tiles"),
        "more tiles, four dimensions": ({"pixel_values": torch.zeros(6, 3, 56, 56)}, "holds 6 tiles; the 1 images"),
        "three dimensions": ({"pixel_values": torch.zeros(3, 56, 56)}, "4 or 5 dimensions"),
        **NO_TENSOR,
    },
    "llava": {
        "sizes, which it does not take": (sizes([60, 100]), "`image_sizes` was given, which LLaVA-1.5 does not take"),
        "two images": ({"pixel_values": torch.zeros(2, 3, 56, 56)}, "the prompt has 16 .* keeps 32 visual tokens"),
        "no image": ({"pixel_values": torch.zeros(0, 3, 56, 56)}, "`pixel_values` holds no image"),
        "five dimensions": ({"pixel_values": torch.zeros(1, 5, 3, 56, 56)}, "has 5 dimensions; it must have 4"),
        **NO_TENSOR,
    },
}


@cases_by_family(REFUSED)
def test_inputs_that_are_refused(bench, name):
    change, message = REFUSED[bench.family.name][name]
    inputs = {**bench.one_image(), **change}
    for call, limits in ((bench.model, {}), (bench.model.model, {}), (bench.model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match=message):
            call(**inputs, **limits)


@ONLY["llava_next"]
def test_what_cannot_be_told_apart(bench):
    """A model sees placeholders and sizes, nothing else: where these fit each other, it cannot know that they are wrong.

    Without newlines, a picture and the same turned on its side keep equally many tokens. Such inputs run.
    """
    with settings(bench.pair, bench.model.config.pruning_config.replace(keep_newlines=False)):
        upright, turned = bench.one_image((60, 100)), bench.one_image((100, 60))
        assert torch.equal(upright["input_ids"], turned["input_ids"])
        with torch.no_grad():
            right = bench.model(**upright).logits
            wrong = bench.model(**{**upright, "image_sizes": turned["image_sizes"]}).logits
    assert right.shape == wrong.shape
    assert not torch.equal(right, wrong)


def test_announcing_counts_changes_no_defaults(bench):
    # Before transformers 5.23 stock's own method writes what it is given into defaults of its class.
    before = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)])["num_image_tokens"]
    given = {"do_pad": False, "size": {"shortest_edge": 56}}
    for asked in (given, {"images_kwargs": given}):
        announced = bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], **asked)
        assert announced["num_image_tokens"] == before


@ONLY["llava_next"]
def test_announcing_counts_for_tiles_that_do_not_divide(bench):
    with pytest.raises(ValueError, match="does not divide into tiles of 112 pixels"):
        bench.processor._get_num_multimodal_tokens(image_sizes=[(60, 100)], size={"shortest_edge": 112})
