"""Processors of Qwen2.5-VL and Qwen3-VL: as many placeholders as the model keeps, at any budget of pixels."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin, pipeline
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import is_torchvision_available

from hivtp_hf.families import video_processing
from hivtp_hf.families.qwen_vl import qwen_vl_layout
from hivtp_hf.pruning.checked_values import MOST_CELLS
from hivtp_hf.pruning.evidence import VisualEvidence, methods_of
from hivtp_hf.pruning.registry import METHODS
from tiny_models import photo
from tiny_qwen import OURS, qwen_processor, save_qwen_checkpoint, save_stock_qwen_checkpoint

FAMILIES = tuple(OURS)
WITHOUT_TORCHVISION = pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, there is a video processor")
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is shown?"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    model, processor = save_qwen_checkpoint(folder, family, {"retention_ratio": 0.3})
    return folder, model, processor


def written(processor, inputs):
    """The placeholders of a call, all rows together."""
    return int((torch.as_tensor(inputs["input_ids"]) == processor.image_token_id).sum())


def test_layouts_announced_counts_and_prompts_agree(family):
    """Over sizes and budgets of pixels; the images themselves of a part of them, as drawing them takes most of the time."""
    generator, side = random.Random(0), 32 if family == "qwen3_vl" else 28
    for number in range(2000):
        lowest = generator.randint(1, 60)
        limits = lowest * side**2, (lowest + generator.randint(3, 300)) * side**2
        size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
        if number % 100 == 0:
            processor = qwen_processor(family, {"retention_ratio": generator.choice([0.03, 0.3, 1.0])}, size=size)
        else:
            processor.image_processor.size = size
        height = generator.randint(2, 900)
        width = min(max(generator.randint(2, 900), -(-height // 190)), 190 * height)
        layout = processor.token_layout(height, width)
        assert 1 <= layout.num_retained <= layout.num_stock
        announced = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert announced["num_image_tokens"] == [layout.num_retained]
        assert announced["num_image_patches"] == [4 * layout.num_stock]
        if number % 20 == 0:
            inputs = processor(images=Image.new("RGB", (width, height)), text=PROMPT)
            assert written(processor, inputs) == layout.num_retained
            assert np.prod(inputs["image_grid_thw"]) == 4 * layout.num_stock


def test_a_budget_of_tokens_for_any_photograph(family):
    processor = qwen_processor(family, {"token_budget": 64})
    for size in ((30, 40), (300, 400), (2000, 3000), (700, 100)):
        layout = processor.token_layout(*size)
        assert layout.num_retained == min(64, layout.num_stock)
    side = 32 if family == "qwen3_vl" else 28
    for given in (
        {"max_pixels": 100 * side**2},
        {"size": {"shortest_edge": 4 * side**2, "longest_edge": 100 * side**2}},
        {"images_kwargs": {"max_pixels": 100 * side**2}},
    ):
        announced = processor._get_num_multimodal_tokens(image_sizes=[(3000, 4000)], token_budget=1000, **given)
        assert 60 < announced["num_image_tokens"][0] <= 100
    inputs = processor(
        images=photo(400, 600),
        text=PROMPT,
        token_budget=1000,
        images_kwargs={"size": {"shortest_edge": 4 * side**2, "longest_edge": 100 * side**2}},
    )
    assert 60 < written(processor, inputs) <= 100


def test_one_edge_of_a_size_alone(family):
    """The other one is what is stored, for what is announced and for what is written."""
    processor, side = qwen_processor(family, {"retention_ratio": 1}), 32 if family == "qwen3_vl" else 28
    for size in ({"longest_edge": 50 * side**2}, {"shortest_edge": 300 * side**2}):
        for given in ({"size": size}, {"images_kwargs": {"size": size}}):
            (announced,) = processor._get_num_multimodal_tokens(image_sizes=[(400, 600)], **given)["num_image_tokens"]
            assert written(processor, processor(images=photo(400, 600), text=PROMPT, **given)) == announced
            assert 300 <= announced < 400 if "shortest_edge" in size else 30 < announced <= 50
    processor.image_processor.size = {"longest_edge": 50 * side**2}
    with pytest.raises(ValueError, match="must have `shortest_edge` and `longest_edge`"):
        processor.token_layout(400, 600)


@pytest.mark.parametrize("where", ["call", "stored"])
def test_images_that_are_not_resized(family, where):
    processor, side = qwen_processor(family, {"retention_ratio": 1}), 32 if family == "qwen3_vl" else 28
    given = {"do_resize": False} if where == "call" else {}
    processor.image_processor.do_resize = where == "call"
    # Beyond the budget of 400 tokens, which resizing alone keeps.
    assert written(processor, processor(images=photo(30 * side, 20 * side), text=PROMPT, **given)) == 600
    announced = processor._get_num_multimodal_tokens(image_sizes=[(30 * side, 20 * side)], **given)
    assert announced["num_image_tokens"] == [600]
    for act in (
        lambda: processor(images=photo(30 * side + 1, 20 * side), text=PROMPT, **given),
        lambda: processor._get_num_multimodal_tokens(image_sizes=[(30 * side + 1, 20 * side)], **given),
    ):
        with pytest.raises(ValueError, match=f"`do_resize` is False.*multiples of {side}"):
            act()


@pytest.mark.parametrize(("name", "value"), [("patch_size", 8), ("merge_size", 4), ("temporal_patch_size", 4)])
def test_patches_are_those_of_the_tower(family, name, value):
    processor = qwen_processor(family)
    own = getattr(processor.image_processor, name)
    for given in ({name: value}, {"images_kwargs": {name: value}}):
        for act in (
            lambda given=given: processor(images=photo(200, 300), text=PROMPT, **given),
            lambda given=given: processor._get_num_multimodal_tokens(image_sizes=[(200, 300)], **given),
        ):
            with pytest.raises(ValueError, match=f"`{name}` is {value} in a call, and {own} in the checkpoint"):
                act()
    same = processor(images=photo(200, 300), text=PROMPT, **{name: own})
    assert same["input_ids"] == processor(images=photo(200, 300), text=PROMPT)["input_ids"]


def test_budgets_of_images(family):
    processor = qwen_processor(family, {"retention_ratio": 0.5})
    images = [photo(200, 300), photo(100, 100), photo(300, 90)]
    text = [PROMPT + PROMPT, PROMPT]
    stock = [processor.token_layout(image.height, image.width).num_stock for image in images]
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt", token_budget=[5, 1, stock[2]])
    assert written(processor, inputs) == 6 + stock[2]
    assert inputs["retention_ratio"].shape == (3,)
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)
    assert "retention_ratio" not in processor(images=images, text=text)
    with pytest.raises(ValueError, match=r"2 .*3 images|3 images.*2"):
        processor(images=images, text=text, retention_ratio=[0.5, 0.5])


def test_a_ratio_of_one_is_stock(family):
    processor = qwen_processor(family, {"retention_ratio": 1})
    stock_class = OURS[family][0].family.stock_classes.processor
    # Stock's cannot be built without a video processor; with our list of parts it can.
    bare = type("Bare", (stock_class,), {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])})
    stock = bare(processor.image_processor, processor.tokenizer, None)
    call = {"images": [photo(200, 300), photo(90, 90)], "text": [PROMPT, PROMPT], "padding": True, "return_tensors": "pt"}
    ours, theirs = processor(**call), stock(**call)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", methods_of(OURS["qwen2_5_vl"][0].family.provides))
def test_at_least_one_token_of_every_image(family, method):
    """Without one, positions would lose step with the images."""
    if METHODS[method].keeps_everything:
        pytest.skip("keeps every token")
    processor = qwen_processor(family, {"method": method, "retention_ratio": 1e-6})
    layout = processor.token_layout(300, 500)
    assert (layout.num_retained, sum(layout.group_totals)) == (1, 1)
    facts = OURS[family][0].family.encoder_facts(OURS[family][0](), {})
    scores = dict.fromkeys(layout.pruning.scored_layers(facts), torch.rand(layout.num_cells))
    keys = dict.fromkeys(scores, torch.rand(layout.num_cells, 4))
    evidence = VisualEvidence([layout], [torch.rand(layout.num_stock, 8)], scores, {}, facts, scores, keys=keys)
    kept = evidence.ask(METHODS[method], METHODS[method].select, layout.pruning)
    assert int(kept.sum()) == 1


def test_saved_and_loaded(saved, family, tmp_path):
    """What is stored of a video processor survives, in either layout of files."""
    folder, _, processor = saved
    again = type(processor).from_pretrained(folder)
    assert again.pruning_config == processor.pruning_config
    call = {"images": photo(200, 300), "text": PROMPT}
    assert again(**call)["input_ids"] == processor(**call)["input_ids"]
    # As stock's folders are: of today, and of before.
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "temporal_patch_size": 2, "fps": 3}
    whole = json.loads((folder / "processor_config.json").read_text())
    for name, stored in (("today", {**whole, "video_processor": video}), ("before", None)):
        copy = tmp_path / name
        processor.save_pretrained(copy)
        if stored is not None:
            (copy / "processor_config.json").write_text(json.dumps(stored))
        else:
            (copy / "processor_config.json").unlink()
            (copy / "preprocessor_config.json").write_text(json.dumps(whole["image_processor"]))
            (copy / "video_preprocessor_config.json").write_text(json.dumps(video))
        type(processor).from_pretrained(copy).save_pretrained(tmp_path / f"{name}, again")
        found = json.loads((tmp_path / f"{name}, again" / "processor_config.json").read_text())
        assert found["video_processor"].items() >= video.items()


def test_stock_folders_load(family, tmp_path):
    folder = save_stock_qwen_checkpoint(tmp_path / "stock", family)
    entry = OURS[family][0].family
    processor = entry.classes.processor.from_pretrained(folder, pruning_config={"token_budget": 9})
    model, report = OURS[family][1].from_pretrained(folder, pruning_config={"token_budget": 9}, output_loading_info=True)
    assert not any(report.values())
    inputs = processor(images=photo(200, 300), text=PROMPT, return_tensors="pt")
    assert written(processor, inputs) == 9
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_through_auto_classes_and_a_pipeline(saved, family):
    folder, model, _ = saved
    processor = AutoProcessor.from_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, OURS[family][1])
    assert type(AutoModel.from_pretrained(folder)) is type(model.model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[photo(200, 300)], text=[text], return_tensors="pt")
    expected = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    answer = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    run = pipeline("image-text-to-text", model=loaded, processor=processor)
    (found,) = run(images=[photo(200, 300)], text=[text], max_new_tokens=5, do_sample=False, return_full_text=False)
    assert found["generated_text"] == answer


def test_remote_code_without_the_package(saved, family):
    folder, _, processor = saved
    inputs = processor(images=[photo(200, 300)], text=[PROMPT], return_tensors="pt")
    # Where torchvision is only half there, the process needs what the plugin of `make test-video` does.
    start = "import torchvision_operators" if "torchvision_operators" in sys.modules else ""
    program = f"""
{start}
import sys
sys.modules["hivtp_hf"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
image = Image.open({str(folder / "photo.png")!r})
inputs = processor(images=[image], text=[{PROMPT!r}], return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()[0])
"""
    photo(200, 300).save(folder / "photo.png")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    expected = loaded.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()[0]
    assert done.stdout.strip().splitlines()[-1] == str(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact_count": False}, "`exact_count` is False; Qwen-VL computes positions from runs"),
        ({"positions": "original"}, "stand at their original places already"),
    ],
)
def test_settings_that_these_families_cannot_follow(family, settings, message):
    for make in (lambda: qwen_processor(family, settings), lambda: OURS[family][0](pruning_config=settings)):
        with pytest.raises(ValueError, match=message):
            make()


def test_images_that_cannot_be(family):
    processor = qwen_processor(family)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        processor.token_layout(3, 900)
    with pytest.raises(ValueError, match=r"2 x 4 x 4 patches in time"):
        qwen_vl_layout((2, 4, 4), processor.pruning_config, 2)
    with pytest.raises(ValueError, match=r"multiples of 2 in height"):
        qwen_vl_layout((1, 4, 5), processor.pruning_config, 2)
    with pytest.raises(ValueError, match=f"{MOST_CELLS} are allowed"):
        qwen_vl_layout((1, 2000, 2000), processor.pruning_config, 2)


@WITHOUT_TORCHVISION
def test_videos_that_nobody_can_read(family):
    processor = qwen_processor(family)
    with pytest.raises(ValueError, match=r"`videos` was given\. Videos need a video processor"):
        processor(videos=[[photo(60, 60)] * 4], text="<|video_pad|>")
    with pytest.raises(ValueError, match=r"`video_sizes` was given\..*pip install torchvision"):
        processor._get_num_multimodal_tokens(video_sizes=[(4, 60, 60)])


class CountingVideoProcessor:
    """Stands in for transformers' own, which needs torchvision: its rule, as far as counts go."""

    merge_size, temporal_patch_size = 2, 2

    def __init__(self, side):
        self.patch_size = side // 2
        self.size = {"shortest_edge": 4 * side**2, "longest_edge": 100 * side**2}

    def get_num_of_video_patches(self, frames, height, width, given):
        factor = self.patch_size * self.merge_size
        resized = smart_resize(height, width, factor, self.size["shortest_edge"], self.size["longest_edge"])
        return -(-frames // 2) * resized[0] * resized[1] // self.patch_size**2


def test_videos_are_counted_as_stock_counts_them(family):
    """Beside images, whose counts stay ours, and by the budget of pixels of the call."""
    processor, side = qwen_processor(family, {"retention_ratio": 0.5}), 32 if family == "qwen3_vl" else 28
    processor.video_processor = CountingVideoProcessor(side)
    sizes = {"image_sizes": [(200, 300)], "video_sizes": [(4, 6 * side, 6 * side), (2, 30 * side, 40 * side)]}
    counted = processor._get_num_multimodal_tokens(**sizes)
    assert counted.num_video_tokens == [72, 88]
    assert counted.num_image_tokens == [processor.token_layout(200, 300).num_retained]
    for given in (
        {"size": {"shortest_edge": side**2, "longest_edge": 16 * side**2}},
        {"videos_kwargs": {"size": {"longest_edge": 16 * side**2}}},
        {"max_pixels": 16 * side**2},
    ):
        assert processor._get_num_multimodal_tokens(**sizes, **given).num_video_tokens == [32, 12]
    assert processor._get_num_multimodal_tokens(**sizes) == counted  # nothing stays of a call
    with pytest.raises(ValueError, match="transformers counts resized videos alone"):
        processor._get_num_multimodal_tokens(**sizes, videos_kwargs={"do_resize": False})
    with pytest.raises(ValueError, match="`merge_size` is 4 in a call"):
        processor._get_num_multimodal_tokens(**sizes, videos_kwargs={"merge_size": 4})


@WITHOUT_TORCHVISION
def test_settings_of_videos_are_looked_for_where_the_call_says(monkeypatch):
    """Without the network where that is what was asked for, as all other files."""
    asked = {}
    monkeypatch.setattr(video_processing, "found_file", lambda name, file, where: asked.update(where))
    monkeypatch.setattr(ProcessorMixin, "get_processor_dict", classmethod(lambda cls, name, **kwargs: ({}, kwargs)))
    given = {"local_files_only": True, "cache_dir": "here", "revision": "main", "subfolder": "part"}
    OURS["qwen2_5_vl"][0].family.classes.processor.get_processor_dict("owner/name", **given)
    assert asked == given
