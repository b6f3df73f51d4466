"""What the tests of odd input share: a model and its processor beside stock's, the comparison, and the check afterwards."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from layouts import counts_of_groups
from tiny_models import LOW_RATIO, Twins, image_inputs, photo, twins

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"
GOOD_SIZES = [(60, 100), (40, 56)]
PRUNING = {**LOW_RATIO, "importance_start_layer": 1, "importance_num_layers": 2}
# As small as it goes with a layer before and after the scored ones: a good call follows every case.
TINY = {"vision_layers": 4, "vision_width": 32, "text_layers": 1, "text_width": 32}

# Marks for tests that make sense for one family only.
ONLY = {family: pytest.mark.parametrize("bench", [family], indirect=True) for family in FAMILIES}


def cases_by_family(cases: dict[str, Any]) -> Any:
    """Runs a test of a `bench` and the `name` of a case for each family on its own cases."""
    pairs = [(family, name) for family, names in cases.items() for name in names]
    return pytest.mark.parametrize(("bench", "name"), pairs, indirect=["bench"])


@contextlib.contextmanager
def open_bench(family: str) -> Iterator["Bench"]:
    """A family's bench, on one thread: its tensors are too small to share out, and two threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Bench(family)
    finally:
        torch.set_num_threads(threads)


class Bench:
    """A pruned model and processor beside their stock twins, and what a good call gave before anything odd came in."""

    def __init__(self, family: str) -> None:
        self.pair: Twins = twins(PRUNING, family=family, **TINY)
        self.family = self.pair.family
        # LLaVA-1.5 sees one square tile of every image, whatever its size, which it therefore is not told.
        self.is_told_sizes = family == "llava_next"
        self.processor, self.model = self.pair.processor, self.pair.pruned
        self.stock_processor, self.stock = self.pair.stock_processor, self.pair.stock
        self.image_token = self.model.config.image_token_id
        self._before = self._good_call()

    def good_inputs(self) -> Any:
        """Two rows, two images of two sizes."""
        images = [photo(*GOOD_SIZES[0]), photo(*GOOD_SIZES[1], 1)]
        return self.processor(images=images, text=[PROMPT, "<image>"], return_tensors="pt", padding=True)

    def one_image(self, size: tuple[int, int] = GOOD_SIZES[0]) -> dict[str, Any]:
        """The inputs of one picture and one prompt."""
        return dict(self.processor(images=photo(*size), text=PROMPT, return_tensors="pt"))

    def sizes(self, inputs: Any) -> list[tuple[int, int]]:
        """Of every image of a call a height and a width that its tokens may be counted for."""
        if inputs.get("pixel_values") is None:
            return []
        if self.is_told_sizes:
            return [tuple(map(int, size)) for size in inputs["image_sizes"]]
        return [GOOD_SIZES[0]] * len(inputs["pixel_values"])

    def check_sizes(self, inputs: Any, sizes: list[tuple[int, int]]) -> None:
        """The inputs hold images of these sizes, as far as the family is told them."""
        if self.is_told_sizes:
            assert self.sizes(inputs) == sizes
        else:
            assert "image_sizes" not in inputs
            assert inputs["pixel_values"].shape == (len(sizes), 3, 56, 56)

    def _good_call(self) -> dict[str, Any]:
        inputs = self.good_inputs()
        with torch.no_grad():
            features = self.model.model.get_image_features(**image_inputs(inputs))
            logits = self.model(**inputs).logits
        # Before transformers 5.23 there are defaults that stock's own methods write to.
        stock_class = self.family.stock_processor
        stock_defaults = vars(sys.modules[stock_class.__module__]).get(f"{stock_class.__name__}Kwargs")
        return {
            "inputs": {key: value.clone() for key, value in inputs.items()},
            "kept_indices": features.kept_indices,
            "logits": logits,
            "config": copy.deepcopy(self.model.config.to_dict()),
            "stock_config": copy.deepcopy(self.stock.config.to_dict()),
            "processor": copy.deepcopy(self.processor.to_dict()),
            "stock_processor": copy.deepcopy(self.stock_processor.to_dict()),
            "tokenizer": (len(self.processor.tokenizer), copy.deepcopy(self.processor.tokenizer.init_kwargs)),
            "defaults": copy.deepcopy(getattr(stock_defaults, "_defaults", None)),
            "attributes": (sorted(vars(self.model.model)), sorted(vars(self.processor))),
        }

    def check_unchanged(self) -> None:
        """A good call gives what it gave before, bit for bit, and no setting has moved."""
        now = self._good_call()
        for key in ("config", "stock_config", "processor", "stock_processor", "tokenizer", "defaults", "attributes"):
            assert now[key] == self._before[key], key
        assert now["inputs"].keys() == self._before["inputs"].keys()
        for key, value in now["inputs"].items():
            assert torch.equal(value, self._before["inputs"][key]), key
        for kept, before in zip(now["kept_indices"], self._before["kept_indices"], strict=True):
            assert torch.equal(kept, before)
        assert torch.equal(now["logits"], self._before["logits"])

    def check_as_stock(self, images: Any, text: Any, **settings: Any) -> Any:
        """Both processors take the input, and so do both models; what ours gives is stock's, less the pruned tokens.

        Returns our processor's inputs.
        """
        settings = {"return_tensors": "pt", "padding": True, **settings}
        inputs = self.processor(images=copy.deepcopy(images), text=text, **settings)
        stock_inputs = self.stock_processor(images=copy.deepcopy(images), text=text, **settings)
        assert inputs.keys() == stock_inputs.keys()
        for key in inputs.keys() - {"input_ids", "attention_mask"}:
            torch.testing.assert_close(inputs[key], stock_inputs[key], rtol=0, atol=0, equal_nan=True)
        # The prompts are the same but for the number of placeholders.
        for row, stock_row, mask, stock_mask in zip(
            inputs.input_ids, stock_inputs.input_ids, inputs.attention_mask, stock_inputs.attention_mask, strict=True
        ):
            ids, stock_ids = row[mask.bool()], stock_row[stock_mask.bool()]
            assert torch.equal(ids[ids != self.image_token], stock_ids[stock_ids != self.image_token])
        if "pixel_values" in inputs:
            sizes = self.sizes(inputs)
            layouts = [self.processor.token_layout(*size) for size in sizes]
            stock_count = int((stock_inputs.input_ids == self.image_token).sum())
            assert stock_count == sum(layout.num_stock for layout in layouts)
            announced = self.processor._get_num_multimodal_tokens(image_sizes=sizes)
            assert announced["num_image_tokens"] == [layout.num_retained for layout in layouts]
        self.check_model(inputs)
        return inputs

    def check_model(self, inputs: Any) -> Tensor:
        """Placeholders, features and layouts count the same, the features are stock's, and so is what follows from them.

        The oracle is the stock language model, given the stock features that are kept. Returns our logits.
        """
        inputs = dict(inputs)
        with torch.no_grad():
            logits = self.model(**inputs).logits
            images, sizes = image_inputs(inputs), self.sizes(inputs)
            inputs = {name: value for name, value in inputs.items() if name not in images}
            embeddings = self.stock.get_input_embeddings()(inputs["input_ids"])
            if images:
                output = self.model.model.get_image_features(**images)
                stock_output = self.stock.model.get_image_features(**images)
                layouts = [self.processor.token_layout(*size) for size in sizes]
                for layout, kept, features, stock_features in zip(
                    layouts, output.kept_indices, output.pooler_output, stock_output.pooler_output, strict=True
                ):
                    assert len(kept) == len(features) == layout.num_retained
                    assert len(stock_features) == layout.num_stock
                    check_indices(kept, layout)
                    torch.testing.assert_close(features, stock_features[kept], rtol=0, atol=0, equal_nan=True)
                is_placeholder = inputs["input_ids"] == self.image_token
                assert int(is_placeholder.sum()) == sum(layout.num_retained for layout in layouts)
                embeddings[is_placeholder] = torch.cat(output.pooler_output)
            inputs.pop("input_ids")
            expected = self.stock(inputs_embeds=embeddings, **inputs).logits
        torch.testing.assert_close(logits, expected, equal_nan=True)
        return logits


def check_indices(kept: Tensor, layout: Any) -> None:
    """Ascending, in range, and on valid cells only: as many of every tile as the layout says (gprune: of all crops)."""
    assert kept.dtype == torch.int64
    assert bool((kept.diff() > 0).all())
    assert int(kept[0]) >= 0
    assert int(kept[-1]) < layout.num_stock
    assert bool(layout.valid[layout.cell_numbers(kept)].all())
    assert counts_of_groups(layout, kept) == layout.group_totals
