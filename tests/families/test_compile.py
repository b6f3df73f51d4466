"""`torch.compile` of the forward: right results, and hardly more graphs than stock needs."""

import os
import shutil
import sys

import pytest
import torch
import torch._dynamo

from forked import run_python
from nightly import mostly_nightly
from tiny_models import LOW_RATIO, TOWERS, photo, twins

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


def graphs_of_twins(tower: str, layers: int) -> tuple[int, int]:
    """The numbers of graphs of a stock model and of its pruned twin."""
    torch.set_num_threads(1)
    scored = {"importance_start_layer": layers - 4, "importance_num_layers": 3}
    pair = twins({**LOW_RATIO, **scored}, **TOWERS[tower], vision_layers=layers)
    stock = compile_and_count_graphs(pair.stock, pair.stock_processor)
    return stock, compile_and_count_graphs(pair.pruned, pair.processor)


# Tracing takes long: a small tower with every commit, and LLaVA-1.5 in one variant, as its towers are the same.
@pytest.mark.parametrize(
    ("tower", "layers"),
    mostly_nightly(
        [
            ("LLaVA-NeXT, CLIP", 4),
            ("LLaVA-NeXT, CLIP", 10),
            ("LLaVA-NeXT, SigLIP", 10),
            ("LLaVA-1.5, CLIP, full", 10),
        ],
        lambda tower, layers: layers == 4,
    ),
)
def test_no_more_graphs_than_stock_plus_one(tower, layers, tmp_path):
    # In a process of its own: what other tests of a process compiled or patched changes how often torch traces anew.
    program = f"import test_compile; print(*test_compile.graphs_of_twins({tower!r}, {layers}))"
    ended = run_python(["-c", program], tmp_path, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ended.returncode == 0, ended.stderr
    stock, pruned = map(int, ended.stdout.split())
    assert 0 < pruned <= stock + 1


# LLaVA-1.5 tells its image sizes by the shape of its pixels, so that stock exports; LLaVA-NeXT's lie in a tensor.
@pytest.mark.parametrize("tower", ["LLaVA-NeXT, CLIP", "LLaVA-1.5, CLIP"])
def test_an_export_with_images_is_refused_and_one_of_text_works(tower):
    pair = twins(LOW_RATIO, **TOWERS[tower])
    inputs = dict(pair.processor(images=photo(60, 100), text="USER: <image>\nWhat is shown?", return_tensors="pt"))
    text = dict(pair.processor(text="USER: What is shown?", return_tensors="pt"))
    with torch.no_grad():
        expected = pair.pruned(**inputs).logits
        with pytest.raises(ValueError, match=r"`torch\.export` is not supported with images"):
            torch.export.export(pair.pruned, (), {**inputs, "use_cache": False})
        assert torch.equal(pair.pruned(**inputs).logits, expected)
        exported = torch.export.export(pair.pruned, (), {**text, "use_cache": False}).module()
        torch.testing.assert_close(exported(**text, use_cache=False).logits, pair.pruned(**text).logits, atol=1e-5, rtol=0)


@pytest.mark.nightly
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_tokens():
    pair = twins(LOW_RATIO)
    inputs = pair.processor(images=photo(60, 100), text="USER: <image>\nWhat is shown?", return_tensors="pt")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = pair.pruned(**inputs).logits
        torch.testing.assert_close(torch.compile(pair.pruned)(**inputs).logits, expected, atol=1e-4, rtol=0)
