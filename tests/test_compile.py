"""`torch.compile` of the forward: right results, and hardly more graphs than stock needs."""

import shutil

import pytest
import torch
import torch._dynamo

from tiny_models import LOW_RATIO, photo, twins

# Every pinpoint shape, repeated ones with other paddings.
SIZES = [(60, 100), (112, 112), (200, 50), (37, 300), (20, 20), (90, 110), (150, 60)]


def compile_and_count_graphs(model, processor) -> int:
    """Runs the compiled model on all sizes, holds it against the model as it is, and counts the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Graphs are what is counted and run here; which code a backend makes of them is torch's matter.
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            inputs = processor(images=photo(*size, seed), text="USER: <image>\nWhat is shown?", return_tensors="pt")
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("vision_type", ["clip_vision_model", "siglip_vision_model"])
def test_no_more_graphs_than_stock_plus_one(vision_type):
    pair = twins(LOW_RATIO, vision_type=vision_type)
    stock = compile_and_count_graphs(pair.stock, pair.stock_processor)
    assert 0 < compile_and_count_graphs(pair.pruned, pair.processor) <= stock + 1


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_tokens():
    pair = twins(LOW_RATIO)
    inputs = pair.processor(images=photo(60, 100), text="USER: <image>\nWhat is shown?", return_tensors="pt")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = pair.pruned(**inputs).logits
        torch.testing.assert_close(torch.compile(pair.pruned)(**inputs).logits, expected, atol=1e-4, rtol=0)
