"""The models as lmms-eval calls them, in this process: rows of every kind, choices, and what is not supported."""

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoints import GEOMETRY
from evaluations import plain_answer
from examples.shapes_vqa.held_out import held_out_rows
from examples.shapes_vqa.reference import CHECKPOINT
from examples.tiny_onevision_checkpoint import build_onevision_checkpoint
from families import FAMILIES
from hivtp_hf.lmms_eval.prompts import RowPrompt
from hivtp_hf.lmms_eval.run_failure import RunFailure
from lmms_eval_runs import EXACT
from tiny_checkpoint import build_stock_checkpoint
from tiny_onevision import SMALL
from tiny_qwen import save_qwen_checkpoint

# Of which llava_hf hands over a text, where the processor's own template takes parts.
TEMPLATE_OF_TEXTS = "USER: {{ messages[0]['content'] }} ASSISTANT:"
GREEDY = {"max_new_tokens": 8, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def rows():
    return list(held_out_rows(12))


def model_of(arguments=f"{EXACT},retention_ratio=2/9", name="hivtp_llava_next", chat=True, batch_size=4):
    build = get_model(name, force_simple=not chat).create_from_arg_string
    return build(arguments, {"batch_size": batch_size, "device": "cpu"})


@pytest.fixture(scope="module")
def chat_model():
    return model_of()


@pytest.fixture(scope="module")
def context_model():
    return model_of(chat=False)


def asked(model, docs, request_type="generate_until", padding=(), **instead):
    """What a model returns for docs, each a question and images; lmms-eval's instances are made as its tasks make them."""
    model.task_dict["shapes"] = {"test": docs}
    requests = []
    for index, (question, _) in enumerate(docs):
        if request_type == "loglikelihood":
            arguments = (question, instead["choices"][index], lambda doc: doc[1], index, "shapes", "test")
        elif model.is_simple:
            arguments = (question, dict(GREEDY), lambda doc: doc[1], index, "shapes", "test")
        else:
            arguments = (question, messages_of, dict(GREEDY), index, "shapes", "test")
        metadata = {"task": "shapes", "doc_id": index, "repeats": 1, "split": "test"}
        if index in padding:
            metadata["__padding_only__"] = True
        requests.append(Instance(request_type=request_type, arguments=arguments, idx=0, metadata=metadata))
    return getattr(model, request_type)(requests)


def messages_of(doc):
    question, images = doc
    content = [{"type": "image", "url": image} for image in images or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def docs_of(rows):
    return [(row.question, [row.open_image()]) for row in rows]


def test_contexts_are_answered_as_messages(chat_model, context_model, rows):
    answers = [result.text for result in asked(chat_model, docs_of(rows))]
    assert [result.text for result in asked(context_model, docs_of(rows))] == answers
    assert sum(answer.strip() == row.answer for answer, row in zip(answers, rows, strict=True)) >= 9
    named = [(f"<image>\n{question}", images) for question, images in docs_of(rows)]
    assert [result.text for result in asked(context_model, named)] == answers


def test_contexts_are_answered_as_by_lmms_evals_own_model(rows):
    own = model_of(f"{EXACT},device_map=cpu", name="llava_hf", chat=False, batch_size=1)
    own.chat_template = TEMPLATE_OF_TEXTS
    model = model_of(f"{EXACT},retention_ratio=1", chat=False)
    docs = docs_of(rows)
    assert [result.text for result in asked(model, docs)] == asked(own, docs)


def test_rows_of_any_number_of_images_go_together(chat_model, rows):
    images = [row.open_image() for row in rows[:4]]
    docs = [
        (rows[0].question, None),
        (rows[1].question, images[:1]),
        (rows[2].question, images[1:4]),
        (rows[3].question, images[3:]),
    ]
    together = asked(chat_model, docs)
    assert [asked(chat_model, [doc])[0] for doc in docs] == together
    assert len({result.token_counts.input_tokens for result in together}) == 4


def test_rows_that_are_only_there_for_their_number_are_not_asked(chat_model, rows):
    chat_model._sums.rows = 0
    results = asked(chat_model, docs_of(rows[:3]), padding=(1,))
    assert [bool(result.text) for result in results] == [True, False, True]
    assert chat_model._sums.rows == 2


def test_llava_is_answered_as_by_hand(tmp_path, rows):
    stock = build_stock_checkpoint(tmp_path / "llava", family="llava", **GEOMETRY)
    model = model_of(f"pretrained={stock},method=hiprune,object_layer=0,retention_ratio=2/9", name="hivtp_llava")
    docs = docs_of(rows[:3])
    answers = [result.text for result in asked(model, docs)]
    family = FAMILIES["llava"]
    pruning = {"method": "hiprune", "object_layer": 0, "retention_ratio": 2 / 9}
    by_hand = family.model.from_pretrained(stock), family.processor.from_pretrained(stock)
    expected = [plain_answer(*by_hand, image, question, pruning, GREEDY["max_new_tokens"]) for question, (image,) in docs]
    assert answers == [answer for answer, _ in expected]
    assert model._sums.patch_tokens == sum(tokens for _, tokens in expected) > 0
    assert "".join(answers)


@torch.no_grad()
def test_choices_have_the_loss_of_their_tokens(context_model, rows):
    model, processor = context_model._model, context_model.processor
    row = rows[0]
    image = row.open_image()
    choices = [f" {row.answer}", " digit digit", row.answer]
    scored = asked(context_model, [(row.question, [image])] * 3, "loglikelihood", choices=choices)
    text = f"USER: <image>\n{row.question} ASSISTANT:"
    before = processor(images=image, text=text, return_tensors="pt").input_ids.shape[1]
    for (loss, greedy), choice in zip(scored, choices, strict=True):
        inputs = processor(images=image, text=f"{text} {choice.strip()}", return_tensors="pt")
        likelihoods = model(**inputs).logits[0].log_softmax(-1)
        tokens = inputs.input_ids[0, before:].tolist()
        single = [likelihoods[before - 1 + place, token].item() for place, token in enumerate(tokens)]
        assert loss == pytest.approx(-sum(single) / len(single), abs=1e-4)
        best = [likelihoods[before - 1 + place].argmax().item() for place in range(len(tokens))]
        assert greedy == (best == tokens)
    assert scored[0] == scored[2]
    assert scored[0][0] < scored[1][0]
    assert [greedy for _, greedy in scored] == [True, False, True]


def test_a_choice_without_tokens_ends_the_run(context_model, rows):
    with pytest.raises(RunFailure, match=r"row 0 of the task 'shapes' \(split 'test'\): ValueError: the continuation ''"):
        asked(context_model, docs_of(rows[:1]), "loglikelihood", choices=[""])


def test_what_cannot_be_done_ends_the_run(chat_model, rows):
    video = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": "What?"}]}]
    chat_model.task_dict["films"] = {"test": [("What?", [Image.new("RGB", (8, 8))]), None]}
    arguments = ("", lambda doc: video if doc is None else messages_of(doc), GREEDY)
    films = [
        Instance(
            request_type="generate_until",
            arguments=(*arguments, index, "films", "test"),
            idx=0,
            metadata={"task": "films", "doc_id": index, "repeats": 1, "split": "test"},
        )
        for index in range(2)
    ]
    with pytest.raises(RunFailure, match=r"row 1 of the task 'films' .* the row has a video"):
        chat_model.generate_until(films)
    for method in (chat_model.generate_until_multi_round, chat_model.generate_visual_cot):
        with pytest.raises(RunFailure, match="films needs"):
            method(films)
    with pytest.raises(RunFailure, match="--force_simple"):
        chat_model.loglikelihood(films)
    with pytest.raises(RunFailure, match="--apply_chat_template"):
        chat_model.apply_chat_template([])


def test_models_that_cannot_be_built_end_the_run():
    for arguments, message in (
        ("pretrained=nowhere", "nowhere is no folder, and no repository"),
        (f"pretrained={CHECKPOINT},batch_size=auto", "`batch_size` is 'auto'.*`--batch_size 4`"),
    ):
        with pytest.raises(RunFailure, match=message):
            get_model("hivtp_llava_next").create_from_arg_string(arguments)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_vl(family, rows, tmp_path):
    """Rows of a batch are answered as one by one, by the checkpoint's own processor and template."""
    folder = tmp_path / family
    own, processor = save_qwen_checkpoint(folder, family, {"retention_ratio": 0.3})
    docs = docs_of(rows[:3])
    model = model_of(f"pretrained={folder},dtype=float32", name=f"hivtp_{family}", batch_size=2)
    expected = []
    for question, images in docs:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=images, text=text, return_tensors="pt")
        ids = own.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(answer.split("\n\n")[0].strip())
    assert [result.text.strip() for result in asked(model, docs)] == expected


def test_llava_onevision(rows, tmp_path):
    """Images are given prompt by prompt, as several in one get no crops; the sums count so too."""
    folder = build_onevision_checkpoint(tmp_path / "onevision", pruning_config={"retention_ratio": 0.3}, **SMALL)
    docs = docs_of(rows[:3])
    model = model_of(f"pretrained={folder},dtype=float32", name="hivtp_llava_onevision", batch_size=2)
    own, processor = (load.from_pretrained(folder) for load in (AutoModelForImageTextToText, AutoProcessor))
    expected = []
    for question, images in docs:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[images], text=text, return_tensors="pt")
        ids = own.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(answer.split("\n\n")[0].strip())
    assert [result.text.strip() for result in asked(model, docs)] == expected
    image = docs[0][1][0]
    model.processor = processor
    for images in ([image], [image, image]):
        sums = model._sums_of([RowPrompt("", images)])
        layouts = processor.prompt_token_layouts([(one.height, one.width) for one in images])
        assert sums.metrics()["stock_tokens"] == sum(layout.num_stock for layout in layouts) / len(images)
