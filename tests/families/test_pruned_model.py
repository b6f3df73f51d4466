"""The model's promises: what is kept is stock's, a ratio of 1 is stock, batches equal single runs."""

import pytest
import torch

from hivtp_hf.pruning import attention_interface as received_attention
from tiny_models import LOW_RATIO, TOWERS, greedy, image_inputs, photo, twins

SIZES = [(60, 100), (112, 112), (200, 50), (37, 300), (20, 20)]
PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    return twins(LOW_RATIO, **TOWERS[request.param])


def prune_by(pair, pruning, monkeypatch):
    for part in (pair.processor, pair.pruned.config):
        monkeypatch.setattr(part, "pruning_config", pruning)


SETTINGS = [
    {},
    {"retention_ratio": 1 / 18},
    {"retention_ratio": 1.0},
    {"retention_ratio": 0.3, "keep_newlines": False},
    {"retention_ratio": 1.0, "keep_newlines": False},
    {"global_ratio": 0.6, "local_window": 3, "regions": 3},
]


@pytest.mark.parametrize("pruning", SETTINGS, ids=str)
def test_kept_features_are_stocks(pair, pruning, monkeypatch):
    prune_by(pair, pruning, monkeypatch)
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = pair.processor(images=images, text=[PROMPT] * len(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = pair.pruned.model.get_image_features(**image_inputs(inputs))
        stock = pair.stock.model.get_image_features(**image_inputs(inputs))
    assert isinstance(output.pooler_output, list)
    placeholders = (inputs.input_ids == pair.pruned.config.image_token_id).sum(1).tolist()
    for i, (kept, features, packed) in enumerate(
        zip(output.kept_indices, output.pooler_output, stock.pooler_output, strict=True)
    ):
        assert kept.dtype == torch.int64
        assert bool((kept.diff() > 0).all())
        assert torch.equal(features, packed[kept])
        assert len(features) == placeholders[i] == pair.processor.token_layout(*SIZES[i]).num_retained
    if pruning == {"retention_ratio": 1.0}:
        assert [len(kept) for kept in output.kept_indices] == [len(packed) for packed in stock.pooler_output]
    assert torch.equal(output.last_hidden_state, stock.last_hidden_state)


def test_ratio_one_is_stock_bit_for_bit_and_scores_nothing(pair, monkeypatch):
    prune_by(pair, {"retention_ratio": 1}, monkeypatch)

    def never(*args):
        raise AssertionError("scored at a ratio of 1")

    monkeypatch.setattr(received_attention, "received_attention", never)
    images = [photo(60, 100), photo(112, 112, 1)]
    text = [PROMPT, "<image> and this one?"]
    inputs = pair.processor(images=images, text=text, return_tensors="pt", padding=True)
    stock_inputs = pair.stock_processor(images=images, text=text, return_tensors="pt", padding=True)
    assert inputs.keys() == stock_inputs.keys()
    assert all(torch.equal(inputs[key], stock_inputs[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(pair.pruned(**inputs).logits, pair.stock(**inputs).logits)
        features = pair.pruned.model.get_image_features(**image_inputs(inputs))
        stock_features = pair.stock.model.get_image_features(**image_inputs(inputs))
    assert all(torch.equal(*pair) for pair in zip(features.pooler_output, stock_features.pooler_output, strict=True))
    assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, inputs))


def test_prompts_without_an_image_are_stocks(pair):
    inputs = pair.processor(text=["no image here", "nor here, at some length"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(pair.pruned(**inputs).logits, pair.stock(**inputs).logits)
    assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, inputs))


@pytest.mark.parametrize("ratio", [1 / 64, 0.25])
def test_the_class_token_is_kept_and_counted_and_never_ranked(ratio):
    """LLaVA-1.5 with CLIP and "full": the first placeholder shows the class token, and the ratio is one of cells."""
    settings = {"retention_ratio": ratio}
    pair, without = (twins(settings, **TOWERS[f"LLaVA-1.5, CLIP{end}"]) for end in (", full", ""))
    inputs, without_inputs = (of.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt") for of in (pair, without))
    (kept,) = pair.pruned.get_image_features(**image_inputs(inputs)).kept_indices
    (kept_without,) = without.pruned.get_image_features(**image_inputs(without_inputs)).kept_indices
    assert len(kept_without) == 64 * ratio
    assert kept.tolist() == [0, *(kept_without + 1).tolist()]
    assert inputs.input_ids.shape[1] == without_inputs.input_ids.shape[1] + 1


def test_siglips_first_cell_is_dropped_as_stock_does():
    """LLaVA-1.5 with SigLIP and "default": stock takes the first cell for a class token, and so it can never be chosen."""
    pair, whole = (twins({"retention_ratio": 1}, **TOWERS[f"LLaVA-1.5, SigLIP{end}"]) for end in (", default", ""))
    inputs = pair.processor(images=photo(60, 100), text=PROMPT, return_tensors="pt")
    (features,) = pair.pruned.get_image_features(**image_inputs(inputs)).pooler_output
    (all_features,) = whole.pruned.get_image_features(**image_inputs(inputs)).pooler_output
    assert torch.equal(features, all_features[1:])
    layout = pair.processor.token_layout(60, 100)
    assert layout.cells(torch.tensor([0])).tolist() == [[0, 0, 1]]
    assert layout.num_retained == layout.num_stock == 63
