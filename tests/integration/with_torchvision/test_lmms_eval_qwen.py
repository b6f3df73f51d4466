"""Qwen-VL in lmms-eval at a ratio of 1, held against lmms-eval's own classes, which need torchvision."""

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lmms_eval")
pytest.importorskip("qwen_vl_utils")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

from tiny_models import photo
from tiny_qwen import save_stock_qwen_checkpoint

SYSTEM = "You are a helpful assistant."


def answers_of(model, docs, system):
    """What a model answers to docs, each a question and an image; instances are made as lmms-eval's tasks make them."""

    def messages(doc):
        user = {"role": "user", "content": [{"type": "image", "url": doc[1]}, {"type": "text", "text": doc[0]}]}
        return [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, user] if system else [user]

    model.task_dict["photos"] = {"test": docs}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(question, messages, {"max_new_tokens": 6, "until": ["\n\n"]}, index, "photos", "test"),
            idx=0,
            metadata={"task": "photos", "doc_id": index, "repeats": 1, "split": "test"},
        )
        for index, (question, _) in enumerate(docs)
    ]
    return [result.text for result in model.generate_until(requests)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_answers_are_those_of_its_own_class(family, tmp_path):
    """Images of whole cells within its budget of pixels, as it resizes twice, by `qwen_vl_utils` and by the processor."""
    folder, side = tmp_path / "stock", 32 if family == "qwen3_vl" else 28
    folder.mkdir()
    save_stock_qwen_checkpoint(folder, family, sharp=True, size={"shortest_edge": 200704, "longest_edge": 1605632})
    shapes = ((16, 20), (22, 18), (18, 18))
    docs = [
        (f"What is shown in image {number}?", photo(rows * side, columns * side, seed=number))
        for number, (rows, columns) in enumerate(shapes)
    ]
    theirs = get_model(family).create_from_arg_string(f"pretrained={folder},device_map=cpu", {"batch_size": 1, "device": "cpu"})
    ours = get_model(f"hivtp_{family}").create_from_arg_string(
        f"pretrained={folder},dtype=bfloat16,retention_ratio=1", {"batch_size": 1, "device": "cpu"}
    )
    # Of a chat its class for Qwen3-VL alone adds a system prompt by itself.
    found = answers_of(ours, docs, system=family == "qwen3_vl")
    assert found == [answer.split("\n\n")[0] for answer in answers_of(theirs, docs, system=False)]
    assert len(set(found)) == len(docs)  # or equal answers would prove nothing
