"""Smaller images that are then pruned, held against models with such small tiles, and processors of such small images."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import GEOMETRY
from evaluations import ROWS, SIZES, data_folder, evaluated, table_of
from hivtp_hf import Evidence, VisualTokenPruningConfig
from hivtp_hf.checkpoints import open_source
from hivtp_hf.evaluation.smaller_images import shrunken_and_pruned_tokens, smaller_images_pruned_tokens
from hivtp_hf.evaluation.variants import (
    chosen_methods,
    grid_of_root,
    planned_variants,
    settings_of_methods,
    shrunken_grid,
)
from hivtp_hf.pruning.registry import METHODS
from tested_methods import TESTED
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import TOWERS, image_inputs, photo, twins
from tiny_qwen import qwen_processor, qwen_twins, save_stock_qwen_checkpoint

PHOTOS = [photo(60, 100), photo(110, 40, seed=1), photo(60, 60, seed=2)]
NONE = VisualTokenPruningConfig(method="none")
HALF = Fraction(1, 2)
# One for every kind of evidence.
METHODS_TRIED = ("hivtp", "cls_attention", "vflowopt", "scope", "divprune", "random")


def patches_of(layout):
    return layout.num_stock - layout.num_newlines - layout.num_class_tokens


def with_small_tiles(pair, geometry, side):
    """A twin whose tiles have so many pixels a side, with the weights of another and its position embeddings interpolated."""
    small = twins({"method": "none"}, **{**geometry, "tile_size": side}).pruned
    names = dict(pair.pruned.named_modules())
    (embeddings,) = (module for name, module in names.items() if name.endswith("embeddings") and "vision" in name)
    tokens = embeddings.position_embedding.num_embeddings - 8**2 + (side // 7) ** 2
    table = embeddings.interpolate_pos_encoding(torch.zeros(1, tokens, embeddings.embed_dim), side, side)[0]
    weights = {
        name: table if "vision" in name and name.endswith("position_embedding.weight") else weight
        for name, weight in pair.pruned.state_dict().items()
    }
    small.load_state_dict(weights)
    return small.eval()


@pytest.mark.parametrize("tower", ["LLaVA-NeXT, CLIP", "LLaVA-NeXT, SigLIP", "LLaVA-1.5, CLIP, full"])
def test_a_smaller_image_is_pruned_as_a_model_with_such_tiles_would(tower):
    pair = twins({"method": "none"}, **TOWERS[tower])
    small = with_small_tiles(pair, TOWERS[tower], 28)
    inputs = pair.processor.image_processor(PHOTOS, return_tensors="pt")
    stock = [pair.processor.family.processor_layout(pair.processor, image.height, image.width, NONE) for image in PHOTOS]
    config = pair.pruned.config.to_dict()
    for method in METHODS_TRIED:
        if method == "cls_attention" and Evidence.CLASS_ATTENTION not in pair.pruned.model.provided_evidence:
            continue
        told = {} if method == "vflowopt" else {"token_weights": "cluster_size"}
        pruning = VisualTokenPruningConfig(method=method, **told, **TESTED[method].small)
        small.config.pruning_config = pruning
        found = shrunken_and_pruned_tokens(pair.pruned, inputs, stock, 4, Fraction(1, 9), pruning)
        for image, tokens in enumerate(found):
            expected = of_small_tiles(small, inputs, image, stock[image])
            torch.testing.assert_close(tokens.features, expected.pooler_output[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(tokens.encoded.kept_indices[0], expected.kept_indices[0])
            if told:
                torch.testing.assert_close(tokens.encoded.log_weights[0], expected.log_weights[0])
                # As many as a ninth of the whole image, to within one a view.
                assert abs(tokens.patches - patches_of(stock[image]) / 9) <= stock[image].num_views
    assert pair.pruned.config.to_dict() == config


@torch.no_grad()
def of_small_tiles(model, inputs, image, stock):
    """What a model with small tiles makes of one image at a ninth of its tokens, in the crops that large tiles would have."""
    tiles = inputs["pixel_values"][image : image + 1]
    own = {name: values[image : image + 1] for name, values in image_inputs(inputs).items()}
    side = model.config.vision_config.image_size
    if tiles.ndim == 5:
        tiles = tiles[:, : stock.num_views]
        crops = stock.parts[1]
        model.config.image_grid_pinpoints = [[crops.down * side, crops.across * side]]
    resized = torch.nn.functional.interpolate(tiles.flatten(0, -4), (side, side), mode="bicubic", antialias=True)
    own["pixel_values"] = resized.unflatten(0, tiles.shape[:-3])
    (size,) = model.model.family.image_sizes(model.model, own)
    layout = model.model.family.layout(model.model, size, NONE, own)
    return model.model.get_image_features(**own, retention_ratio=patches_of(stock) / 9 / patches_of(layout))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_any_size_are_made_smaller_and_pruned(family):
    pair, processor = qwen_twins(family, {"method": "none"}), qwen_processor(family, {"method": "none"})
    images = [photo(300, 500), photo(448, 448, seed=1), photo(60, 60, seed=2)]
    stock = [processor.family.processor_layout(processor, image.height, image.width, NONE) for image in images]
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    pruning = (
        VisualTokenPruningConfig(method="hivtp", **TESTED["hivtp"].small)
        if family == "qwen3_vl"
        else VisualTokenPruningConfig()
    )
    for ratio in (HALF, Fraction(1, 9), Fraction(1, 100)):
        found = smaller_images_pruned_tokens(pair.pruned, processor, images, stock, ratio, pruning)
        for image, tokens, layout in zip(images, found, stock, strict=True):
            most = max(1, math.floor(math.sqrt(ratio) * layout.num_stock))
            size = {"shortest_edge": side**2, "longest_edge": most * side**2}
            inputs = processor.image_processor([image], size=size, return_tensors="pt")
            (own,) = pair.pruned.model.family.image_sizes(pair.pruned.model, inputs)
            smaller = pair.pruned.model.family.layout(pair.pruned.model, own, NONE, {}).num_stock
            assert smaller <= most
            pair.pruned.config.pruning_config = pruning
            with torch.no_grad():
                expected = pair.pruned.model.get_image_features(
                    **inputs, retention_ratio=min(1.0, float(ratio * layout.num_stock / smaller))
                )
            pair.pruned.config.pruning_config = {"method": "none"}
            assert torch.equal(tokens.features, expected.pooler_output[0])
            assert torch.equal(tokens.inputs["image_grid_thw"], inputs["image_grid_thw"])
            assert abs(tokens.patches - max(1, ratio * layout.num_stock)) <= 1
            if family == "qwen3_vl":
                assert torch.equal(tokens.encoded.deepstack_features[1][0], expected.deepstack_features[1][0])


def test_answers_are_those_of_generate_on_a_smaller_image(tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    save_stock_qwen_checkpoint(folder, "qwen2_5_vl", sharp=True)
    methods = {"methods": "downsample+hivtp,downsample+random", "ratios": "1/4,1/9", "batch_size": 3}
    run = evaluated(folder, data_folder(tmp_path / "data"), tmp_path / "runs", **methods)
    source = open_source(str(folder))
    model, processor = source.load_model(NONE, dtype="auto"), source.load_processor(NONE)
    side, answers = processor.image_processor.patch_size * processor.image_processor.merge_size, set()
    photos = {name: photo(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}
    for line in table_of(run.folder / "predictions.csv"):
        if line["method"] != "none":
            image, question, _, _ = ROWS[int(line["row"]) - 1]
            ratio = 1 / 4 if line["asked_ratio"] == "0.25" else 1 / 9
            whole = processor.token_layout(photos[image].height, photos[image].width).num_stock
            size = {"shortest_edge": side**2, "longest_edge": max(1, math.floor(math.sqrt(ratio) * whole)) * side**2}
            smaller = processor.image_processor([photos[image]], size=size, return_tensors="pt")["image_grid_thw"].prod() // 4
            seed = {"seed": int(line["seed"])} if line["seed"] else {}
            method = line["method"].removeprefix("downsample+")
            model.config.pruning_config = processor.pruning_config = {
                **{"method": method, "retention_ratio": min(1.0, ratio * whole / int(smaller)), **seed},
            }
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(images=photos[image], text=text, size=size, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answer = processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            tokens = int((inputs.input_ids == processor.image_token_id).sum())
            assert (line["prediction"], int(line["patch_tokens"])) == (answer, tokens)
            answers.add(answer)
    assert len(answers) > len(ROWS)  # or equal answers would prove nothing


def test_it_is_a_method_of_an_evaluation(tmp_path):
    stock = build_stock_checkpoint(tmp_path / "stock", **GEOMETRY)
    options = {"methods": "downsample+hivtp,hivtp", "ratios": "1/2,1/9", "batch_size": 2}
    options["weights_and_positions"] = "published,both"
    run = evaluated(stock, data_folder(tmp_path / "data"), tmp_path / "runs", **options)
    lines = table_of(run.folder / "predictions.csv")
    assert len(lines) == len(ROWS) * (1 + 2 * 2 + 2 * 2)
    whole = {line["row"]: int(line["patch_tokens"]) for line in lines if line["method"] == "none"}
    for line in lines:
        if line["method"].startswith("downsample+"):
            assert abs(int(line["patch_tokens"]) - float(line["asked_ratio"]) * whole[line["row"]]) <= 5
            # Rows of crops have fewer newlines.
            of_pruned = next(other for other in lines if other["method"] == "hivtp" and other["row"] == line["row"])
            assert int(line["newline_tokens"]) < int(of_pruned["newline_tokens"])
    by_way = [
        [line["prediction"] for line in lines if line["method"] == "downsample+hivtp" and line["weights_and_positions"] == told]
        for told in ("published", "both")
    ]
    assert by_way[0] != by_way[1]
    shares = sorted({row.ratio for row in run.metrics if row.method == "downsample+hivtp"})
    assert shares == pytest.approx([1 / 9, 1 / 2], abs=0.03)


@pytest.mark.once
def test_methods_behind_a_smaller_image_are_named_and_planned():
    names = chosen_methods("downsample+random,hivtp,downsample+hivtp")
    assert names == ("none", "hivtp", "downsample+hivtp", "downsample+random")
    assert not [name for name in chosen_methods(None) if "+" in name]
    for wrong in ("downsample+none", "downsample+downsample", "base-only+hivtp"):
        with pytest.raises(ValueError, match=r"or downsample\+ with a method behind it, such as downsample\+hivtp"):
            chosen_methods(wrong)
    settings = settings_of_methods(names, VisualTokenPruningConfig(), ["random.exact_count=true", "hivtp.regions=1"])
    assert list(settings) == ["hivtp", "random"]
    plan = planned_variants(names, (HALF, Fraction(1, 9)), settings, grid=12)
    smaller = [variant for variant in plan if variant.is_of_smaller_images]
    assert [(one.method, one.ratio, one.grid, one.seed) for one in smaller[:3]] == [
        ("downsample+hivtp", HALF, 10, None),
        ("downsample+hivtp", Fraction(1, 9), 6, None),
        ("downsample+random", HALF, 10, 0),
    ]
    assert all(one.settings.regions == 1 for one in smaller[:2])
    assert all(one.ratio_is_measured for one in smaller)
    assert {one.selector for one in plan} == {"none", "hivtp", "random"}
    # Images of sizes of their own are not made of cells of a tile.
    assert {one.grid for one in planned_variants(names, (HALF,), settings, grid=None)} == {None}
    assert set(METHODS) > set(settings)


@pytest.mark.once
@given(st.integers(1, 60), st.fractions(0, 1).filter(lambda ratio: 0 < ratio < 1))
def test_shrinking_leaves_the_square_root(grid, ratio):
    side = grid_of_root(grid, ratio)
    assert side == 1 or side**4 <= ratio * grid**4
    assert (side + 1) ** 4 > ratio * grid**4
    assert side >= shrunken_grid(grid, ratio)
