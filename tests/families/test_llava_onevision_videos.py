"""LLaVA-OneVision's videos: counts, frames in every form, and answers against stock given the pruned sequence."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny_onevision_checkpoint import onevision_config
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.families.llava_onevision_layout import llava_onevision_video_layout
from hivtp_hf.pruning.compat import cache_argument, cache_of, prefills_images_in_chunks
from hivtp_hf.pruning.evidence import methods_of
from hivtp_hf.pruning.registry import METHODS
from oracle import oracle_inputs
from tiny_models import photo
from tiny_onevision import ENTRY, FAMILY, onevision_parts, onevision_twins, video_oracle

# VFlowOpt drops tokens inside the language model, which videos do not.
METHODS_THAT_CAN = [method for method in methods_of(ENTRY.provides) if method != "vflowopt"]
SCOPES = ("frame", "video")
TEXT = "USER: <video>\nWhat happens? ASSISTANT:"
RATIO = {"retention_ratio": 0.4}
# Cells of a frame of the small models, 4 x 4, and of 27 x 27 patches.
POOLED, TRUE_POOLED = 16, 14 * 14


@pytest.fixture(scope="module")
def pair():
    return onevision_twins()


@pytest.fixture(autouse=True)
def start_over(request):
    """Settings are changed on the models that tests share."""
    if "pair" in request.fixturenames:
        use(request.getfixturevalue("pair"), RATIO)


def use(pair, pruning):
    pair.processor.pruning_config = pair.pruned.config.pruning_config = pruning


def video(frames=5, seed=0, size=(70, 90)):
    return [photo(*size, seed=100 * seed + number) for number in range(frames)]


def prepared(processor, *videos, **options):
    return processor(videos=list(videos), text=[TEXT] * len(videos), padding=True, return_tensors="pt", **options)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model, inputs, number=5, **options):
    given = inputs.get("input_ids")
    output = model.generate(**inputs, **{"max_new_tokens": number, "do_sample": False, **options})
    return output if given is None else output[:, given.shape[1] :]


def own_settings(method, scope, ratio=0.4):
    budget = {} if METHODS[method].keeps_everything else {"retention_ratio": ratio}
    return {"method": method, "video_scope": scope, **budget}


def placeholders(pair, inputs):
    return (inputs["input_ids"] == pair.pruned.config.video_token_id).sum(1).tolist()


@pytest.mark.parametrize("frames", [1, 2, 7, 32, 64])
def test_counts_of_true_geometry_equal_stocks(frames):
    config = onevision_config()
    processor = FAMILY.processor(**onevision_parts(config), pruning_config={"method": "none"})
    with torch.device("meta"):
        stock = FAMILY.stock_base(config)
        ours = FAMILY.base(FAMILY.config(**{**config.to_dict(), "model_type": "hivtp_llava_onevision"}))
        features = stock.get_video_features(torch.empty(1, frames, 3, 384, 384)).pooler_output
    assert processor.video_token_layout(frames).num_stock == features.shape[1] == frames * TRUE_POOLED + 1
    stocks = len(FAMILY.stock_processor.replace_video_token(processor, {"pixel_values_videos": [[0] * frames]}, 0))
    assert stocks == len("<video>") * features.shape[1]
    for scope, kept in (("frame", frames * round(TRUE_POOLED * 0.3)), ("video", round(frames * TRUE_POOLED * 0.3))):
        pruning = VisualTokenPruningConfig("uniform", retention_ratio=0.3, video_scope=scope)
        layout = ENTRY.video_layout(ours, frames, pruning)
        processor.pruning_config = pruning
        assert layout.num_retained == processor.video_token_layout(frames).num_retained
        assert abs(layout.num_retained - 1 - kept) <= (0 if scope == "frame" else 1)
        assert processor._get_num_multimodal_tokens(video_sizes=[(frames, 70, 90)]).num_video_tokens == [layout.num_retained]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS_THAT_CAN)
def test_logits_equal_the_oracle(pair, method, scope):
    use(pair, own_settings(method, scope))
    inputs = prepared(pair.processor, video(), video(seed=1))
    layout = pair.processor.video_token_layout(5)
    assert placeholders(pair, inputs) == [layout.num_retained] * 2
    expected = logits(pair.stock, video_oracle(pair, inputs))
    torch.testing.assert_close(logits(pair.pruned, inputs), expected, atol=2e-5, rtol=2e-5)
    of_frames = [
        layout.cell_numbers(kept).div(POOLED, rounding_mode="floor").bincount(minlength=5).tolist()
        for kept in pair.pruned.get_video_features(inputs["pixel_values_videos"]).kept_indices
    ]
    assert all(sum(counts) == layout.num_retained - 1 for counts in of_frames)
    # Methods that choose from a whole image do so from a whole video.
    if scope == "frame" and len(layout.group_totals) > 1:
        assert all(counts == list(layout.group_totals) for counts in of_frames)
    assert len(layout.group_totals) in ((1,) if scope == "video" else (1, 5))


def test_frames_are_chosen_from_by_their_own_scores(pair):
    """The best cells of each frame, or of all frames, by stock's maps after stock's pooling."""
    inputs = prepared(pair.processor, video())
    eager = copy.deepcopy(pair.stock)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager.model.vision_tower(inputs["pixel_values_videos"][0], output_attentions=True).attentions
    received = maps[-1].mean(1).sum(1)
    pooled = pair.stock.model.apply_pooling(received[..., None])[..., 0]
    # HiPrune without anchors is the best by the deep layer.
    for scope in SCOPES:
        use(pair, {"method": "hiprune", "alpha": 0.0, "object_layer": 5, "video_scope": scope, **RATIO})
        layout = pair.processor.video_token_layout(5)
        (kept,) = pair.pruned.get_video_features(inputs["pixel_values_videos"]).kept_indices
        cells = layout.cell_numbers(kept).tolist()
        groups = pooled if scope == "frame" else pooled.view(1, -1)
        size = groups.shape[1]
        best = [
            number * size + int(cell)
            for number, (scores, count) in enumerate(zip(groups, layout.group_totals, strict=True))
            for cell in scores.topk(count).indices
        ]
        assert cells == sorted(best)
        assert kept[-1] == layout.num_stock - 1  # the newline


def test_a_ratio_of_one_is_stock(pair):
    use(pair, {"retention_ratio": 1})
    inputs = prepared(pair.processor, video(), video(seed=1))
    assert placeholders(pair, inputs) == [5 * POOLED + 1] * 2
    assert torch.equal(logits(pair.pruned, inputs), logits(pair.stock, inputs))
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        assert torch.equal(greedy(pair.pruned, inputs, **options), greedy(pair.stock, inputs, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beams", "static", "no cache"],
)
def test_generation_equals_the_oracle(pair, options):
    inputs = prepared(pair.processor, video(), video(seed=1))
    expected = greedy(pair.stock, video_oracle(pair, inputs), **options)
    assert torch.equal(greedy(pair.pruned, inputs, **options), expected)


def test_prefill_in_chunks(pair):
    inputs = prepared(pair.processor, video())
    if not prefills_images_in_chunks():
        with pytest.raises(ValueError, match="drops the images from a prefill in chunks"):
            greedy(pair.pruned, inputs, prefill_chunk_size=16)
        return
    assert torch.equal(greedy(pair.pruned, inputs, prefill_chunk_size=16), greedy(pair.pruned, inputs))


def test_images_beside_videos_and_ratios_of_each(pair):
    text = ["USER: <image>\n<video>\nWhat? ASSISTANT:", "USER: <video>\nWhat? ASSISTANT:"]
    call = {"images": [[photo(170, 165)]], "videos": [video(), video(seed=1)], "text": text, "padding": True}
    for budget in ({}, {"retention_ratio": [0.2, 0.5, 0.5]}, {"retention_ratio": 0.3}, {"token_budget": 40}):
        inputs = pair.processor(**call, return_tensors="pt", **budget)
        ratios = inputs.get("retention_ratio")
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **images}
        if ratios is not None:
            assert len(ratios) == 3
            given["retention_ratio"] = ratios[:1]
        embeddings = oracle_inputs(pair, given)
        of_videos = video_oracle(pair, inputs)["inputs_embeds"]
        is_video = (inputs["input_ids"] == pair.pruned.config.video_token_id)[..., None]
        embeddings["inputs_embeds"] = torch.where(is_video, of_videos, embeddings["inputs_embeds"])
        is_token = inputs["attention_mask"].bool()
        expected, found = logits(pair.stock, embeddings), logits(pair.pruned, inputs)
        torch.testing.assert_close(found[is_token], expected[is_token], atol=2e-5, rtol=2e-5)
        assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, embeddings))
        if "token_budget" in budget:
            assert max(placeholders(pair, inputs)) <= 40


def test_a_later_turn_with_a_video(pair):
    first, second = prepared(pair.processor, video()), prepared(pair.processor, video(seed=1))
    returned = pair.pruned.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat((returned.sequences, second["input_ids"]), dim=1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    name = cache_argument(FAMILY.stock_model.forward)
    pixels = torch.cat((first["pixel_values_videos"], second["pixel_values_videos"]))
    continued = pair.pruned.generate(**given, pixel_values_videos=second["pixel_values_videos"], **{name: cache_of(returned)})
    assert torch.equal(continued, pair.pruned.generate(**given, pixel_values_videos=pixels))


def test_training_gets_the_oracles_gradients(pair):
    inputs = prepared(pair.processor, video())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == pair.pruned.config.video_token_id, -100)
    given = video_oracle(pair, inputs)
    gradients = []
    for model, arguments in ((pair.pruned, inputs), (pair.stock, given)):
        model.zero_grad()
        model(**arguments, labels=labels).loss.backward()
        gradients.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert pair.pruned.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    for model in (pair.pruned, pair.stock):
        model.zero_grad()


def test_frames_in_every_form(pair):
    """PIL images of any mode, arrays and tensors, channels first or last, one video or several: the same pixels."""
    frames = video()
    expected = prepared(pair.processor, frames)["pixel_values_videos"]
    assert expected.shape == (1, 5, 3, 58, 58)
    arrays = np.stack([np.asarray(frame) for frame in frames])
    forms = [
        [frames],
        frames,
        [[np.asarray(frame) for frame in frames]],
        [arrays],
        arrays,
        arrays.transpose(0, 3, 1, 2),
        torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy()),
        arrays[None],
        [[frame.convert("RGBA") for frame in frames]],
    ]
    for given in forms:
        inputs = pair.processor(videos=given, text=TEXT, return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], expected)
    grey = [frame.convert("L") for frame in frames]
    inputs = pair.processor(videos=[grey], text=TEXT, return_tensors="pt")
    assert torch.equal(
        inputs["pixel_values_videos"], prepared(pair.processor, [one.convert("RGB") for one in grey])["pixel_values_videos"]
    )


def test_frames_are_prepared_as_a_tile_is(pair):
    """Resized, rescaled and normalised, which is what the image processor makes of its base tile."""
    (frame,) = video(1)
    base_tile = pair.processor(images=frame, text="<image>", return_tensors="pt")["pixel_values"][0, 0]
    of_video = prepared(pair.processor, [frame])["pixel_values_videos"][0, 0]
    torch.testing.assert_close(of_video, base_tile, atol=0, rtol=0)
    # Settings of a call, and those that were stored of a video processor.
    mean = prepared(pair.processor, [frame], videos_kwargs={"do_normalize": False})["pixel_values_videos"]
    assert mean.min() >= 0
    assert mean.max() <= 1
    stored = FAMILY.processor(
        **{**onevision_parts(pair.stock.config), "video_processor": {"do_normalize": False, "do_sample_frames": False}}
    )
    assert torch.equal(prepared(stored, [frame])["pixel_values_videos"], mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"videos": "clip.mp4"}, "without torchvision videos are not read from files"),
        ({"videos": [video(2), video(3)], "text": [TEXT] * 2}, "have 2 to 3 frames"),
        ({"videos": [video(2)], "num_frames": 2}, "`num_frames` was given with videos, and there is no torchvision"),
        ({"videos": [video(2)], "retention_ratio": [0.5, 0.2]}, "has 2 values, and the call has 1 image"),
    ],
)
def test_calls_that_cannot_be(pair, call, message):
    with pytest.raises(ValueError, match=message):
        pair.processor(**{"text": TEXT, "return_tensors": "pt", **call})


def test_inputs_and_settings_that_do_not_fit(pair):
    inputs = prepared(pair.processor, video())
    use(pair, {"retention_ratio": 0.5})
    with pytest.raises(ValueError, match=r"the prompt has \d+ video placeholders, but the model keeps \d+"):
        pair.pruned(**inputs)
    with pytest.raises(ValueError, match="`pixel_values_videos` is"):
        pair.pruned.get_video_features(torch.zeros(1, 2, 3, 56, 56))
    with pytest.raises(ValueError, match="videos of one tensor"):
        pair.pruned.get_video_features(torch.zeros(2, 2, 3, 58, 58), retention_ratio=[0.5, 0.2])
    with pytest.raises(ValueError, match="`frames` is 0"):
        llava_onevision_video_layout(0, VisualTokenPruningConfig(), 8, 58, 7)
    for extra in ({"positions": "original"}, {"token_weights": "cluster_size"}, {"stages": [[1, 0.5]]}, {"exact_count": False}):
        ratio = {} if "exact_count" in extra else RATIO
        use(pair, {**ratio, **extra})
        with pytest.raises(ValueError, match="with videos they must be True, 'none', 'packed' and empty"):
            prepared(pair.processor, video())
        with pytest.raises(ValueError, match="with videos they must be True, 'none', 'packed' and empty"):
            pair.pruned.get_video_features(inputs["pixel_values_videos"])


def test_methods_with_stages_of_their_own_are_refused(pair):
    use(pair, {"method": "vflowopt", **RATIO})
    with pytest.raises(ValueError, match="another than 'vflowopt', which has stages of its own"):
        prepared(pair.processor, video())
    # At a ratio of 1 there is nothing to drop.
    use(pair, {"method": "vflowopt", "retention_ratio": 1})
    inputs = prepared(pair.processor, video())
    assert torch.equal(greedy(pair.pruned, inputs), greedy(pair.stock, inputs))


def test_where_cells_of_a_frame_lie():
    processor = FAMILY.processor(**onevision_parts(onevision_config()), pruning_config={"method": "none"})
    layout = processor.video_token_layout(2, image_size=(768, 384))
    boxes = layout.pixel_boxes(layout.cell_positions)
    # 378 of 384 pixels in 14 cells are 27 each, on frames twice as high.
    for frame in (boxes[:TRUE_POOLED], boxes[TRUE_POOLED:]):
        torch.testing.assert_close(frame[0], torch.tensor([0, 0, 27, 54], dtype=torch.float64))
        torch.testing.assert_close(frame[-1], torch.tensor([351, 702, 378, 756], dtype=torch.float64))


def test_video_of_one_image_equals_the_image_pooled(pair):
    """What stock pools is what a tile has."""
    use(pair, {"method": "none"})
    image = Image.new("RGB", (58, 58), (200, 30, 30))
    features = pair.pruned.get_video_features(prepared(pair.processor, [image])["pixel_values_videos"]).pooler_output
    assert features.shape[:2] == (1, math.ceil(8 / 2) ** 2 + 1)
    assert torch.equal(features[0, -1], pair.pruned.model.image_newline)
