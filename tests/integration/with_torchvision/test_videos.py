"""Videos in Qwen-VL by transformers' own video processors: they pass whole, beside images that are pruned."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from hivtp_hf import VisualTokenPruningConfig
from tiny_models import photo
from tiny_qwen import OURS, STOCK, save_stock_qwen_checkpoint

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


class Loaded:
    """A stock checkpoint, and models and processors of both kinds that are loaded from it."""

    def __init__(self, folder, family):
        self.folder, self.family = folder, OURS[family][0].family
        self.side = 32 if family == "qwen3_vl" else 28
        save_stock_qwen_checkpoint(folder, family, sharp=True)
        # As the Hub has them.
        video = {
            "video_processor_type": self.family.classes.processor.video_processor_type,
            "size": {"shortest_edge": 4 * self.side**2, "longest_edge": 90 * self.side**2},
            "patch_size": self.side // 2,
            "fps": 3,
        }
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
        self.stock_processor = self.family.stock_classes.processor.from_pretrained(folder)
        self.processor = self.family.classes.processor.from_pretrained(folder)
        self.stock = STOCK[family][1].from_pretrained(folder)
        self.pruned = OURS[family][1].from_pretrained(folder)

    def inputs(self, ratio, text=f"{VIDEO}What moves? {IMAGE}What is shown?"):
        """Of stock's processor, and of ours at a ratio."""
        pruning = VisualTokenPruningConfig(retention_ratio=ratio)
        self.processor.pruning_config = self.pruned.config.pruning_config = pruning
        call = {"images": [photo(200, 300)], "videos": [clip(7, 130, 180)], "text": [text], "return_tensors": "pt"}
        return [processor(**call, do_sample_frames=False) for processor in (self.stock_processor, self.processor)]


def clip(frames, height, width):
    """A video whose frames differ."""
    return np.stack([np.asarray(photo(height, width, seed=seed)) for seed in range(frames)])


@pytest.fixture(scope="module", params=tuple(OURS))
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "stock"
    folder.mkdir()
    return Loaded(folder, request.param)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@torch.no_grad()
def logits_of_columns(stock, inputs, stays):
    """What stock's language model makes of some columns of a prompt, at their own places and with their own features."""
    given = {}
    with stock.model.language_model.register_forward_pre_hook(
        lambda module, args, arguments: given.update(arguments), with_kwargs=True
    ):
        stock(**inputs, use_cache=False)
    is_visual, streams = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
    told = {
        "inputs_embeds": given["inputs_embeds"][:, stays],
        "position_ids": given["position_ids"][..., stays],
        "attention_mask": inputs["attention_mask"][:, stays],
    }
    if is_visual is not None:
        told["visual_pos_masks"] = is_visual[:, stays]
        told["deepstack_visual_embeds"] = [layer[stays[is_visual[0]]] for layer in streams]
    return stock.lm_head(stock.model.language_model(**told).last_hidden_state)


def test_a_ratio_of_one_is_stock(loaded):
    stock, pruned = loaded.inputs(1)
    assert stock.keys() == pruned.keys()
    assert all(torch.equal(stock[name], pruned[name]) for name in stock)
    assert torch.equal(logits(loaded.pruned, pruned), logits(loaded.stock, stock))
    answers = [
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for model, inputs in ((loaded.pruned, pruned), (loaded.stock, stock))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("text", [f"{VIDEO}What moves? {IMAGE}What is shown?", f"{IMAGE}Like this? {VIDEO}"])
def test_videos_pass_whole_beside_pruned_images(loaded, text):
    stock, pruned = loaded.inputs(0.3, text)
    config = loaded.stock.config
    number = [int((inputs["input_ids"] == config.video_token_id).sum()) for inputs in (stock, pruned)]
    assert number[0] == number[1] > 40
    assert torch.equal(stock["pixel_values_videos"], pruned["pixel_values_videos"])
    video = {"pixel_values_videos": pruned["pixel_values_videos"], "video_grid_thw": pruned["video_grid_thw"]}
    with torch.no_grad():
        features = [model.get_video_features(**video, return_dict=True) for model in (loaded.pruned, loaded.stock)]
        (kept,) = loaded.pruned.get_image_features(pruned["pixel_values"], pruned["image_grid_thw"]).kept_indices
    assert torch.equal(*(torch.cat(list(of_model.pooler_output)) for of_model in features))
    places = (stock["input_ids"][0] == config.image_token_id).nonzero().flatten()
    assert 0 < len(kept) < len(places)
    stays = stock["input_ids"][0] != config.image_token_id
    stays[places[kept]] = True
    assert torch.equal(stock["input_ids"][:, stays], pruned["input_ids"])
    expected = logits_of_columns(loaded.stock, stock, stays)
    assert torch.equal(logits(loaded.pruned, pruned), expected)
    answer = loaded.pruned.generate(**pruned, max_new_tokens=1, do_sample=False, suppress_tokens=None)
    assert int(answer[0, -1]) == int(expected[0, -1].argmax())


def test_settings_of_videos_survive(loaded, tmp_path):
    loaded.processor.save_pretrained(tmp_path)
    again = [type(loaded.processor).from_pretrained(tmp_path), type(loaded.stock_processor).from_pretrained(tmp_path)]
    for processor in (loaded.processor, *again):
        own, stock = (part.video_processor.to_dict() for part in (processor, loaded.stock_processor))
        assert own == stock
        assert (own["fps"], dict(own["size"])["longest_edge"]) == (3, 90 * loaded.side**2)


@pytest.mark.parametrize("edges", [None, (4, 30), (200, 400), ("longest", 20)])
def test_announced_counts_are_what_is_written(loaded, edges):
    processor, area = loaded.processor, loaded.side**2
    given = {}
    if edges is not None and edges[0] == "longest":
        given = {"videos_kwargs": {"size": {"longest_edge": edges[1] * area}}}
    elif edges is not None:
        given = {"size": {"shortest_edge": edges[0] * area, "longest_edge": edges[1] * area}}
    counts = []
    for size in ((4, 130, 180), (7, 300, 90), (2, 400, 600)):
        announced = processor._get_num_multimodal_tokens(video_sizes=[size], **given).num_video_tokens
        inputs = processor(videos=[clip(*size)], text=[VIDEO], do_sample_frames=False, return_tensors="pt", **given)
        written = int((inputs["input_ids"] == loaded.stock.config.video_token_id).sum())
        assert announced == [written]
        counts.append(written)
    assert edges is None or counts != [
        processor._get_num_multimodal_tokens(video_sizes=[size]).num_video_tokens[0]
        for size in ((4, 130, 180), (7, 300, 90), (2, 400, 600))
    ]
