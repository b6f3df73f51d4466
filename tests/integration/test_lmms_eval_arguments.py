"""What stands between lmms-eval and the model, as far as it needs no lmms-eval: arguments, prompts, failures, sums."""

import json

import pytest
from PIL import Image

from checkpoints import GEOMETRY, build_pruned_checkpoint
from examples.shapes_vqa.reference import CHECKPOINT
from hivtp_hf import HIVTPLlavaNextProcessor, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.checkpoints import convert_checkpoint
from hivtp_hf.families import FAMILIES
from hivtp_hf.lmms_eval.generation_arguments import generation_arguments
from hivtp_hf.lmms_eval.loaded_checkpoint import checked_template, loaded_checkpoint
from hivtp_hf.lmms_eval.model_arguments import with_arguments
from hivtp_hf.lmms_eval.prompts import messages_of_context, prompt_of_messages
from hivtp_hf.lmms_eval.run_failure import RunFailure, failing_with_the_row
from hivtp_hf.lmms_eval.token_sums import TokenSums, settings_as_numbers, summed
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

OWN = VisualTokenPruningConfig(importance_start_layer=4, retention_ratio=0.25)
OTHERS = ("pretrained", "dtype")


@pytest.fixture(scope="module")
def processor():
    return HIVTPLlavaNextProcessor.from_pretrained(CHECKPOINT)


def test_given_settings_rule_over_the_checkpoints():
    assert with_arguments(OWN, {}, OTHERS) == OWN
    assert with_arguments(OWN, {"retention_ratio": "2/9"}, OTHERS) == OWN.replace(retention_ratio=2 / 9)
    given = {"method": "hiprune", "deep_layer": "none", "alpha": 1, "retention_ratio": 0.5}
    assert with_arguments(OWN, given, OTHERS).to_dict() == {
        **VisualTokenPruningConfig(method="hiprune", alpha=1.0, deep_layer=None).to_dict(),
        "retention_ratio": 0.5,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"retension_ratio": 0.5},
            r"`retension_ratio` is no argument. Did you mean `retention_ratio`\? Arguments are pretrained, dtype",
        ),
        ({"object_layer": 3}, "`object_layer`: not a setting of the method 'hivtp'"),
        ({"retention_ratio": "a half"}, "`retention_ratio` is 'a half'"),
    ],
)
def test_settings_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        with_arguments(OWN, given, OTHERS)


def test_answers_are_greedy_unless_the_task_has_a_temperature():
    how = generation_arguments({"temperature": 0, "top_p": 0.9, "do_sample": True, "image_aspect_ratio": "original"})
    assert how.of_generate == {
        **{"max_new_tokens": 1024, "num_beams": 1, "do_sample": False},
        **{"temperature": None, "top_p": None, "top_k": None},
    }
    assert how.unused == ("image_aspect_ratio",)
    how = generation_arguments({"temperature": 0.7, "top_p": 0.9, "do_sample": False, "max_new_tokens": 5, "num_beams": 2})
    assert how.of_generate == {"max_new_tokens": 5, "num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert how.unused == ()


def test_answers_end_where_the_task_says():
    how = generation_arguments({"until": ["ASSISTANT:", "\n\n", ".", ""]})
    assert how.cut("a cat. ASSISTANT: a dog.") == "a cat"
    assert how.cut("first\n\nsecond") == "first\n\nsecond"
    assert generation_arguments({"until": "d"}).cut("a b c d") == "a b c "
    assert generation_arguments({"until": None}).cut("a") == "a"
    for until in (5, ["a", 5]):
        with pytest.raises(ValueError, match=r"`until` is .*a text or a list of texts"):
            generation_arguments({"until": until})


def test_images_stand_where_the_context_names_them_or_in_front():
    one, two = {"type": "image", "image": "1.png"}, {"type": "image", "image": "2.png"}

    def content(context, visuals):
        ((message),) = messages_of_context(context, visuals, "<image>")
        assert message["role"] == "user"
        return message["content"]

    assert content("What?", ["1.png", "2.png"]) == [one, two, {"type": "text", "text": "What?"}]
    assert content("What?", None) == content("What?", []) == [{"type": "text", "text": "What?"}]
    assert content("<image>\nWhat?", ["1.png"]) == [one, {"type": "text", "text": "What?"}]
    words = [{"type": "text", "text": text} for text in ("Of ", " and ", "")]
    assert content("Of <image> and <image>", ["1.png", "2.png"]) == [words[0], one, words[1], two, words[2]]
    with pytest.raises(ValueError, match="names 1 images, and the row has 2"):
        messages_of_context("<image> What?", ["1.png", "2.png"], "<image>")


def test_prompts_have_an_image_for_every_place(processor, tmp_path):
    def prompt(*content, template=None):
        return prompt_of_messages(processor, [{"role": "user", "content": list(content)}], template)

    image, question = Image.new("RGB", (30, 20)), {"type": "text", "text": "What?"}
    image.save(tmp_path / "grey.png")
    text, images = prompt({"type": "image", "image": image}, {"type": "image", "image": str(tmp_path / "grey.png")}, question)
    assert text == "USER: <image>\n<image>\nWhat? ASSISTANT:"
    assert images[0] is image
    assert images[1].size == (30, 20)
    assert prompt(question) == ("USER: What? ASSISTANT:", [])
    assert prompt(question, template="{{ messages[0]['content'][0]['text'] }}!").text == "What?!"
    for content, message in (
        ([{"type": "image", "image": image}, {"type": "text", "text": "Of <image>?"}], "2 places for images.*1 images"),
        ([{"type": "image", "image": str(tmp_path / "none.png")}], "must be a PIL image or the path of a file"),
        ([{"type": "video", "video": "a.mp4"}], "the row has a video"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt(*content)


def test_chat_templates_may_be_files(processor, tmp_path):
    assert checked_template(None, processor) is None
    assert checked_template("{{ messages }}", processor) == "{{ messages }}"
    (tmp_path / "chat.jinja").write_text("{{ 1 }}")
    assert checked_template(str(tmp_path / "chat.jinja"), processor) == "{{ 1 }}"
    with pytest.raises(ValueError, match="`chat_template` is 5"):
        checked_template(5, processor)
    bare = HIVTPLlavaNextProcessor.from_pretrained(CHECKPOINT)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template; give `chat_template`"):
        checked_template(None, bare)


def test_a_failure_names_the_row_and_is_no_exception(capsys):
    def work(rows):
        if 0 in rows:
            raise ZeroDivisionError("by zero")
        if len(rows) > 2:
            raise MemoryError("too many")
        return [1 / row for row in rows]

    assert failing_with_the_row([1, 2], work) == [1.0, 0.5]
    with pytest.raises(RunFailure, match=r"\A0: ZeroDivisionError: by zero\. The run ends here") as failed:
        failing_with_the_row([1, 0, 2], work)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert not isinstance(failed.value, Exception)
    assert "in work" in capsys.readouterr().err
    with pytest.raises(RunFailure, match=r"1 to 3, which go well one by one .*`--batch_size` .*MemoryError: too many"):
        failing_with_the_row([1, 2, 3], work)


def test_sums_are_means_over_images_and_processes():
    pruning = VisualTokenPruningConfig(retention_ratio=0.5)
    layouts = [TokenLayout.from_image_size(*size, pruning) for size in ((480, 640), (300, 451), (336, 336))]
    first, second = TokenSums(rows=1), TokenSums(rows=3, generated_tokens=7, seconds=2.0)
    first.add_image(layouts[0])
    for layout in layouts[1:]:
        second.add_image(layout)
    total = summed([first, second])
    assert (total.generated_tokens, total.seconds) == (7, 2.0)
    assert total.metrics() == {
        "rows": 4,
        "images": 3,
        "stock_tokens": sum(layout.num_stock for layout in layouts) / 3,
        "retained_patch_tokens": sum(layout.num_retained - layout.num_newlines for layout in layouts) / 3,
        "retained_newline_tokens": sum(layout.num_newlines for layout in layouts) / 3,
        "retained_class_tokens": 0,
    }
    assert TokenSums(rows=2).metrics() == {"rows": 2, "images": 0}


def test_every_kind_of_checkpoint_loads_under_the_settings_that_were_given(tmp_path):
    family = FAMILIES[0]
    pruned = build_pruned_checkpoint(tmp_path, {"method": "uniform", "keep_newlines": False})
    stock = build_stock_checkpoint(tmp_path / "other", **GEOMETRY)
    tokenizer = json.loads((stock / "tokenizer_config.json").read_text())
    (stock / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"padding_side": "right"}))
    convert_checkpoint(str(stock), tmp_path / "config_only", config_only=True, show_progress=False)

    def loaded(folder, family=family, **pruning):
        return loaded_checkpoint(
            str(folder),
            family,
            family.classes.config.model_type,
            pruning,
            revision=None,
            trust_remote_code=False,
            other_names=OTHERS,
        )

    for folder, own in (
        (stock, VisualTokenPruningConfig()),
        (pruned, VisualTokenPruningConfig(method="uniform", keep_newlines=False)),
        (tmp_path / "config_only", VisualTokenPruningConfig()),
    ):
        model, processor = loaded(folder, retention_ratio="1/9")
        assert model.config.pruning_config == processor.pruning_config == own.replace(retention_ratio=1 / 9)
        assert processor.tokenizer.padding_side == "left"
        assert processor.tokenizer.pad_token is not None
    with pytest.raises(
        ValueError, match=r"takes 'llava' and 'hivtp_llava'\. Give the checkpoint to `--model hivtp_llava_next`"
    ):
        loaded(stock, family=FAMILIES[1])


def test_settings_that_are_lists_are_words():
    numbers = settings_as_numbers(VisualTokenPruningConfig(importance_layers=[7, 15], stages=[[8, 0.5], [0.75, 0.25]]))
    assert numbers["importance_layers_7+15"] == numbers["stages_8:0.5+0.75:0.25"] == 1
    assert not {"importance_layers", "stages"} & set(numbers)
    assert not any(name.startswith("stages") for name in settings_as_numbers(VisualTokenPruningConfig()))
