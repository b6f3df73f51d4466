"""VFlowOpt in whole models: what it reads, against maps and pixels taken by hand; its averages; and the published count."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.families.llava_towers import PIXEL_SCALES
from hivtp_hf.methods.vflowopt import grey_level_entropy, merge_vflowopt, strategy_vflowopt
from hivtp_hf.pruning.merging import with_averages
from hivtp_hf.pruning.registry import METHODS
from places_reference import Placed
from tiny_models import COMMON, IMAGE_TOKEN, SIGLIP, image_inputs, photo, twins
from tiny_qwen import images_of, qwen_twins

OWN = {"method": "vflowopt", "retention_ratio": 0.3, "sink_threshold": 1.2, "recycling_cell_side": 3.3, "entropy_weight": 0.3}
SIZES = [(60, 100), (200, 50)]


def plain_importance(attention, threshold):
    """Of one view, from the mean over heads of its attention (tokens, tokens) without a class token."""
    received = attention.mean(0)
    sinks = (received > threshold * received.mean()).nonzero()[:, 0].tolist() or [int(received.argmax())]
    return attention[sinks].mean(0)


def plain_entropy(grey):
    """Of one cell, from its grey levels."""
    shares = torch.bincount(grey.flatten().long(), minlength=256) / grey.numel()
    return -(shares * (shares + 1e-10).log2()).sum()


def grey_of(processor, images):
    """Grey levels from 0 to 255 of what the image processor makes of images, before it normalises."""
    unnormalised = processor.image_processor(images=images, do_normalize=False, return_tensors="pt")["pixel_values"]
    return (unnormalised * 255).mean(-3).round()


@pytest.mark.parametrize("tower", [{}, SIGLIP], ids=["CLIP", "SigLIP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_chain_by_hand(family, tower):
    pair = twins(OWN, family=family, **tower)
    # As checkpoints have it with either tower.
    scale = PIXEL_SCALES[pair.pruned.config.vision_config.model_type]
    pair.processor.image_processor.image_mean, pair.processor.image_processor.image_std = scale
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = pair.processor(images=images, text="<image> and <image>", return_tensors="pt")
    grey = grey_of(pair.processor, images)
    base = pair.pruned.model
    layouts = [pair.processor.token_layout(*size) for size in SIZES]
    has_class_token = int(not tower)
    with torch.no_grad():
        output = pair.pruned.get_image_features(**image_inputs(inputs))
        look = pair.pruned.look(inputs)
        packed = pair.stock.get_image_features(**image_inputs(inputs)).pooler_output
        vision = pair.stock.model.vision_tower
        vision.set_attn_implementation("eager")
    layer = base.encoder_facts().feature_layer
    found = look.importance().split([layout.num_cells for layout in layouts])
    for image, layout in enumerate(layouts):
        views = range(layout.num_views)
        pixels = inputs["pixel_values"][image].view(-1, 3, 56, 56)[: layout.num_views]
        levels = grey[image].view(-1, 56, 56)[: layout.num_views]
        with torch.no_grad():
            maps = vision(pixels, output_attentions=True).attentions[layer].mean(1)[:, has_class_token:, has_class_token:]
        importance = []
        for view in views:
            entropy = torch.stack(
                [plain_entropy(levels[view, y : y + 7, x : x + 7]) for y in range(0, 56, 7) for x in range(0, 56, 7)]
            )
            importance.append(plain_importance(maps[view], 1.2) + 0.3 * entropy.softmax(0))
        importance = torch.cat(importance)
        torch.testing.assert_close(found[image], importance, atol=1e-5, rtol=1e-4)
        merged = merge_vflowopt(importance, layout, layout.pruning)
        assert torch.equal(output.kept_indices[image], merged.kept_indices)
        assert torch.equal(output.is_average[image], merged.is_average)
        assert merged.is_average.sum() > 3
        expected = with_averages([packed[image]], [packed[image][merged.kept_indices]], [merged])[0]
        torch.testing.assert_close(output.pooler_output[image], expected, atol=1e-5, rtol=1e-4)
    features, kept = look.kept()
    assert all(map(torch.equal, features, output.pooler_output))
    assert all(map(torch.equal, kept, output.kept_indices))


def maps_of_last_block(model, images):
    """Of every image the attention of a Qwen tower's last block, mean over heads, from what reaches the interface."""
    found = []

    def spy(module, query, key, value, attention_mask, scaling, **kwargs):
        found.append((module, (query @ key.transpose(-1, -2) * scaling).softmax(-1)[0].mean(0)))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy_attention", spy)
    before = model.visual.config._attn_implementation
    try:
        model.visual.set_attn_implementation("spy_attention")
        with torch.no_grad():
            model.get_image_features(**images)
    finally:
        model.visual.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping["spy_attention"]
    last = model.visual.blocks[-1].attn
    return [attention for module, attention in found if module is last]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"])
def test_a_packed_tower_by_hand(family):
    """Sinks and importance per patch of the last block, the mean over merged patches; every stream averaged alike."""
    pair = qwen_twins(family, {**OWN, "entropy_weight": 0.0})
    grids = [(8, 12), (24, 20), (4, 4)]
    images = images_of(grids, pair.pruned)
    with torch.no_grad():
        output = pair.pruned.get_image_features(**images)
        look = pair.pruned.look(images)
        stock = pair.stock.get_image_features(**images)
    maps = maps_of_last_block(pair.stock.model, images)
    assert [len(of_image) for of_image in maps] == [height * width for height, width in grids]
    of_images = [plain_importance(of_image, 1.2).view(-1, 4).mean(1) for of_image in maps]
    if family == "qwen2_5_vl":  # the tower has cells in the order of its windows
        for image, (height, width) in enumerate(grids):
            cells = [(row, column) for row in range(height // 2) for column in range(width // 2)]
            in_windows = sorted(cells, key=lambda cell: (cell[0] // 4, cell[1] // 4, *cell))
            in_raster = dict(zip(in_windows, of_images[image].tolist(), strict=True))
            of_images[image] = torch.tensor([in_raster[cell] for cell in cells])
    torch.testing.assert_close(look.importance(), torch.cat(list(of_images)), atol=1e-6, rtol=1e-4)
    for image, (layout, importance) in enumerate(zip(look.layouts(), of_images, strict=True)):
        merged = merge_vflowopt(importance, layout, layout.pruning)
        assert torch.equal(output.kept_indices[image], merged.kept_indices)
        assert torch.equal(output.is_average[image], merged.is_average)
        streams = [("pooler_output", output.pooler_output, stock.pooler_output)]
        if family == "qwen3_vl":
            deep = zip(output.deepstack_features, stock.deepstack_features, strict=True)
            streams += [("deepstack", ours, theirs) for ours, theirs in deep]
        for name, ours, theirs in streams:
            whole = theirs[image]
            expected = with_averages([whole], [whole[merged.kept_indices]], [merged])[0]
            torch.testing.assert_close(ours[image], expected, atol=1e-4, rtol=1e-4, msg=name)
    assert sum(int(of_image.sum()) for of_image in output.is_average) > 10
    single = {name: images[name][: 8 * 12 if name == "pixel_values" else 1] for name in images}
    with torch.no_grad():
        assert torch.equal(pair.pruned.get_image_features(**single).kept_indices[0], output.kept_indices[0])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_grey_levels_of_a_packed_tower(family):
    """Patches as the processor lays them out, from an image of known levels."""
    base = qwen_twins(family, OWN).pruned.model
    rows, columns, side = 3, 5, 28 if family != "qwen3_vl" else 2 * base.config.vision_config.patch_size
    generator = torch.Generator().manual_seed(3)
    picture = torch.randint(0, 256, (3, rows * side, columns * side), generator=generator)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in base.family.pixel_scale)
    normalised = (picture / 255 - mean) / std
    patch = side // 2
    patches = normalised.unflatten(2, (columns, 2, patch)).unflatten(1, (rows, 2, patch))  # c, row, y, py, column, x, px
    patches = patches.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # row, column, y, x: c, py, px
    twice = patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)
    arguments = {"pixel_values": twice, "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]])}
    layouts = [base.family.layout(base, (1, 2 * rows, 2 * columns), VisualTokenPruningConfig(**OWN), {})]
    levels = base.family.grey_levels(base, arguments, layouts)
    grey = picture.float().mean(0).round()
    expected = grey.unflatten(1, (columns, side)).unflatten(0, (rows, side)).transpose(1, 2).flatten(2).flatten(0, 1)
    # Half levels may round either way once a level has been to and from what the model is given.
    assert ((levels.sort(1).values.float() - expected.sort(1).values).abs() <= 1).all()
    torch.testing.assert_close(grey_level_entropy(levels), grey_level_entropy(expected.to(torch.uint8)), atol=0.02, rtol=0)
    assert base.look(arguments).importance().shape == (rows * columns,)


def test_pixels_are_not_looked_at_without_an_entropy_weight(monkeypatch):
    pair = twins({**OWN, "entropy_weight": 0.0})
    inputs = pair.processor(images=photo(60, 100), text="<image>", return_tensors="pt")

    def refuse(*arguments):
        raise AssertionError("pixels were read")

    monkeypatch.setattr(type(pair.pruned.model.family), "grey_levels", refuse)
    with torch.no_grad():
        pair.pruned.get_image_features(**image_inputs(inputs))
        pair.pruned.config.pruning_config = OWN
        with pytest.raises(AssertionError, match="pixels were read"):
            pair.pruned.get_image_features(**image_inputs(inputs))


def test_ratios_of_their_own_have_thresholds_of_their_own(monkeypatch):
    """In one pass, every view goes by the strategy of its image."""
    pair = twins({"method": "vflowopt"})
    asked = []
    method = METHODS["vflowopt"]
    rows = type(method).rows
    monkeypatch.setattr(
        type(method), "rows", lambda self, received, prunings: asked.extend(prunings) or rows(self, received, prunings)
    )
    images = [photo(*size) for size in SIZES]
    inputs = pair.processor(images=images, text="<image><image>", return_tensors="pt", retention_ratio=[0.1, 0.3])
    with torch.no_grad():
        pair.pruned.get_image_features(**image_inputs(inputs), retention_ratio=inputs["retention_ratio"])
    views = [pair.processor.token_layout(*size).num_views for size in SIZES]
    assert [pruning.retention_ratio for pruning in asked] == [0.1] * views[0] + [0.3] * views[1]
    assert strategy_vflowopt(asked[0]).sink_threshold > strategy_vflowopt(asked[-1]).sink_threshold


def test_one_look_serves_several_strategies():
    pair = twins({"method": "vflowopt"})
    inputs = pair.processor(images=[photo(*size) for size in SIZES], text="<image><image>", return_tensors="pt")
    prunings = [{**OWN, "retention_ratio": ratio, "sink_threshold": threshold} for ratio, threshold in ((0.2, 1.1), (0.4, 1.6))]
    look = pair.pruned.look(inputs, [*prunings, {"method": "hivtp", "retention_ratio": 0.3}])
    with torch.no_grad():
        for pruning in prunings:
            pair.pruned.config.pruning_config = pruning
            expected = pair.pruned.get_image_features(**image_inputs(inputs))
            features, kept = look.kept(pruning)
            assert all(map(torch.equal, features, expected.pooler_output))
            assert all(map(torch.equal, kept, expected.kept_indices))
    with pytest.raises(ValueError, match=r"'vflowopt' reads the encoder layers \[8\], and \[8\] were not looked at"):
        look.kept({**OWN, "sink_threshold": 3})


INEXACT = {"method": "vflowopt", "retention_ratio": 0.6, "recycling_cell_side": 2, "exact_count": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_count(family):
    """Placeholders for the most that may be kept; what is left over has no effect."""
    pair = twins(INEXACT, family=family)
    texts = ["a <image> b c", "<image>, <image> what is shown"]
    images = [photo(60, 100), photo(200, 50, 1), photo(90, 90, 2)]
    inputs = pair.processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = pair.pruned.get_image_features(**image_inputs(inputs))
    lacking = [len(rows) - len(kept) for rows, kept in zip(output.pooler_output, output.kept_indices, strict=True)]
    assert max(lacking) > 0
    for rows, number in zip(output.pooler_output, lacking, strict=True):
        assert not rows[:number].any()
        assert rows[number:].any(1).all()

    # The same prompt without the placeholders that are left over, row by row.
    generated = pair.pruned.generate(**inputs, **COMMON)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        together = pair.pruned(**inputs).logits
    first = 0
    for row, number in enumerate((1, 2)):
        of_row = slice(first, first + number)
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        shorter, image, seen = [], first, 0
        for token in ids:
            if token == IMAGE_TOKEN:
                seen += 1
                if seen > lacking[image]:
                    shorter.append(token)
                if seen == len(output.pooler_output[image]):
                    image, seen = image + 1, 0
            else:
                shorter.append(token)
        placed = Placed.__new__(Placed)
        placed.stock, placed.pruning, placed.in_stages = pair.stock, pair.pruned.config.pruning_config, True
        placed.features = [rows[lack:] for rows, lack in zip(output.pooler_output[of_row], lacking[of_row], strict=True)]
        placed.kept = [kept.tolist() for kept in output.kept_indices[of_row]]
        placed.log_weights = [torch.zeros(len(kept)) for kept in placed.kept]
        placed.lost = [0] * number
        placed.survived = [
            survived[lack:].tolist() for survived, lack in zip(output.stages_survived[of_row], lacking[of_row], strict=True)
        ]
        placed.first_images = [0]
        with torch.no_grad():
            sequence = torch.tensor([shorter])
            for step in range(generated.shape[1]):
                logits = placed.logits(sequence)[0, -1]
                if step == 0:
                    torch.testing.assert_close(
                        together[row, inputs["attention_mask"][row].nonzero()[-1, 0]], logits, atol=1e-4, rtol=1e-4
                    )
                logits[IMAGE_TOKEN] = -torch.inf
                logits[2] = -torch.inf  # the end of the sequence, which `min_new_tokens` puts off
                token = int(logits.argmax())
                assert token == int(generated[row, step])
                sequence = torch.cat((sequence, torch.tensor([[token]])), dim=1)
        first += number
