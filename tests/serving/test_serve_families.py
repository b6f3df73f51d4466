"""`hivtp serve` answers from checkpoints of every family what `generate` does; test_serve.py holds the rest on one of them."""

import pytest

from checkpoints import build_pruned_checkpoint
from examples.tiny_onevision_checkpoint import build_onevision_checkpoint
from served import ON_CPU, Reference, image_part, serving, text_part
from tiny_models import photo
from tiny_onevision import SMALL
from tiny_qwen import OURS, save_qwen_checkpoint

PRUNING = {"method": "hivtp", "retention_ratio": 0.3}
# In a prompt of several, OneVision gives images no crops.
CONVERSATIONS = ((photo(170, 165),), (photo(130, 220, seed=1), photo(220, 130, seed=2)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {"llava": build_pruned_checkpoint(folder, PRUNING, "llava", vision_layers=9)}
    for family in OURS:
        found[family] = folder / family
        save_qwen_checkpoint(folder / family, family, {"method": "hiprune", "retention_ratio": 0.3}, sharp=True)
    found["llava_onevision"] = build_onevision_checkpoint(folder / "llava_onevision", pruning_config=PRUNING, **SMALL)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that was given no checkpoint: requests name theirs."""
    with serving(tmp_path_factory.mktemp("server"), *ON_CPU) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("family", ["llava", *OURS, "llava_onevision"])
def test_answers_are_those_of_generate(server, checkpoints, family):
    """One image and two, by the settings of the checkpoint and by a budget of the request."""
    reference = Reference.of(checkpoints[family])
    for images in CONVERSATIONS:
        content = [*map(image_part, images), text_part("What is shown?")]
        lengths = []
        for budget in ({}, {"retention_ratio": 0.8}):
            expected = reference.answer("What is shown?", *images, **budget)
            extra = {"chat_template_kwargs": {"processor_kwargs": budget}} if budget else {}
            assert server.ask(checkpoints[family], content, extra_body=extra) == expected
            lengths.append(expected.prompt_tokens)
        assert lengths[0] < lengths[1]
