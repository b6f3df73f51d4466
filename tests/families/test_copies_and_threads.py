"""Threads, copies of the code and models with other settings do not meet: each keeps what it would keep alone."""

import shutil
import sys
import threading

import pytest
import torch

from checkpoints import build_pruned_checkpoint, run_without_package
from families import FAMILIES
from tiny_models import LOW_RATIO, greedy, image_inputs, photo, twins

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"
SIZES = [(60, 100), (112, 112), (200, 50)]


def answer(pair, size):
    inputs = pair.processor(images=photo(*size), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        (kept,) = pair.pruned.get_image_features(**image_inputs(inputs)).kept_indices
    return kept.tolist(), greedy(pair.pruned, inputs).tolist()


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize(
    "settings",
    [(LOW_RATIO, None), ({"method": "hiprune", **LOW_RATIO}, {"method": "gprune"})],
    ids=["one model", "two methods"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads(family, settings):
    """One model, or two with different settings, that have never run before; in each thread another image."""
    first = twins(settings[0], family=family)
    pairs = [first, twins(settings[1], family=family) if settings[1] else first]
    alone = [twins(given or settings[0], family=family) for given in settings]
    expected = [answer(pair, size) for pair, size in zip(alone, SIZES, strict=False)]
    got, errors = [[], []], []
    start = threading.Barrier(2, timeout=60)

    def work(thread):
        try:
            start.wait()
            for _ in range(4):
                got[thread].append(answer(pairs[thread], SIZES[thread]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert expected[0] != expected[1]
    assert got == [[expected[0]] * 4, [expected[1]] * 4]


def revisions(folder, family):
    """Checkpoints that bring their code along. The second revision's prefers what receives the least attention."""
    first = build_pruned_checkpoint(folder, LOW_RATIO, family)
    second = shutil.copytree(first, first.with_name("second_revision"))
    file = second / f"hivtp_{family}.py"
    source, line = file.read_text(), "return _over_all_heads(summed, query.shape[1], num_heads) / (num_heads * query.shape[2])"
    assert source.count(line) == 1
    file.write_text(source.replace(line, line.replace("(summed", "(-summed")))
    return {"first": str(first), "second": str(second)}


def kept_in_turn(folders, copies, family):
    """Loads copies of the code into one process, in the order given, then lets them run in turn, twice.

    "package" is the installed one, with the first folder's weights; it cannot be imported before its turn comes.
    """
    import sys

    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = {"llava_next": "HIVTPLlavaNextForConditionalGeneration", "llava": "HIVTPLlavaForConditionalGeneration"}
    models = {}
    for copy in copies:
        if copy == "package":
            if sys.modules.get("hivtp_hf", sys) is None:
                del sys.modules["hivtp_hf"]
            import hivtp_hf

            Model = getattr(hivtp_hf, names[family])
        elif "package" in models:
            # With the package imported, the Auto classes prefer it to remote code of the same type.
            Model = get_class_from_dynamic_module(f"hivtp_{family}.{names[family]}", folders[copy])
        else:
            Model = AutoModelForImageTextToText
        models[copy] = Model.from_pretrained(folders.get(copy, folders["first"]), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folders["first"], trust_remote_code="package" not in models)
    kept = {copy: [] for copy in copies}
    for turn in range(2):
        for height, width in [(60, 100), (112, 112), (200, 50)]:
            pixels = np.random.default_rng(turn).integers(0, 256, (height, width, 3), dtype=np.uint8)
            inputs = processor(images=Image.fromarray(pixels), text="<image>", return_tensors="pt")
            for copy, model in models.items():
                with torch.no_grad():
                    output = model.get_image_features(inputs["pixel_values"], image_sizes=inputs.get("image_sizes"))
                    assert model(**inputs).logits.isfinite().all()
                kept[copy].append(output.kept_indices[0].tolist())
    return {"kept": kept, "modules": [type(model).__module__ for model in models.values()]}


# The copies of each process, in the order in which they come; the first process tells what the second revision keeps alone.
ORDERS = {
    "llava_next": [("second",), ("first", "second", "package"), ("package", "second", "first")],
    "llava": [("second",), ("first", "package", "second")],
}


@pytest.mark.parametrize("family", ORDERS)
def test_copies_of_the_code_take_turns(tmp_path, family):
    folders, orders = revisions(tmp_path, family), ORDERS[family]

    def run(order):
        work_folder = tmp_path / "-".join(order)
        return run_without_package(kept_in_turn, work_folder, folders=folders, copies=order, family=family)

    results = [run(order) for order in orders]
    # The first folder's code is the package's, so what it keeps alone can be seen here.
    first = kept_in_turn(folders, ["package"], family)["kept"]["package"]
    alone = {"first": first, "second": results[0]["kept"]["second"], "package": first}
    assert all(kept != other for kept, other in zip(alone["first"], alone["second"], strict=True))
    for order, result in zip(orders, results, strict=True):
        assert len(set(result["modules"])) == len(order)
        assert [module.split(".")[0] == "hivtp_hf" for module in result["modules"]] == [copy == "package" for copy in order]
        for copy in order:
            assert result["kept"][copy] == alone[copy], f"{copy} among {order}"
