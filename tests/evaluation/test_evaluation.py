"""What `hivtp evaluate` feeds the language model, held against processor and model as a user calls them."""

import functools

import pytest
import torch

from checkpoints import GEOMETRY
from evaluations import ROWS, SIZES, data_folder, evaluated, plain_answer, table_of
from families import FAMILIES
from hivtp_hf import Evidence, TokenLayout, VisualTokenPruningConfig
from hivtp_hf.checkpoints import CheckpointSource, open_source
from hivtp_hf.evaluation import answering
from hivtp_hf.evaluation.prompts import prompt_of
from hivtp_hf.evaluation.smaller_images import shrunken_tokens
from hivtp_hf.evaluation.tower_pass import (
    base_tile_tokens,
    check_kept_indices,
    pruned_tokens,
    see,
)
from hivtp_hf.pruning.registry import METHODS
from tested_methods import TESTED
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import TOWERS, image_inputs, photo, twins

PHOTOS = [photo(60, 100), photo(110, 40, seed=1), photo(60, 60, seed=2)]


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request, tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp(request.param) / "stock", family=request.param, **GEOMETRY)


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    return twins({"method": "none"}, **TOWERS[request.param])


def prunings_of(pair):
    return [
        VisualTokenPruningConfig(method=method, retention_ratio=ratio, **TESTED[method].small)
        for method in METHODS
        if method != "none" and (Evidence.CLASS_ATTENTION in pair.pruned.model.provided_evidence or method != "cls_attention")
        for ratio in (0.5, 1 / 9)
    ]


def inputs_of(pair, images=PHOTOS):
    return pair.processor.image_processor(images, return_tensors="pt")


def layouts_of(pair, pruning, images=PHOTOS):
    return [pair.processor.family.processor_layout(pair.processor, image.height, image.width, pruning) for image in images]


def test_one_pass_serves_all_methods_as_their_own_would(pair):
    """Every method's default reads layer 8 in its own way, or others besides. Placeholders left over take no part."""
    prunings = [*prunings_of(pair), VisualTokenPruningConfig(exact_count=False, global_ratio=0.4)]
    inputs = inputs_of(pair)
    tiles, left_over = [], []
    hook = pair.pruned.model.vision_tower.register_forward_hook(lambda module, args, output: tiles.append(len(args[0])))
    seen = see(pair.pruned, inputs, prunings)
    hook.remove()
    assert tiles == [sum(layout.num_views for layout in layouts_of(pair, prunings[0]))]
    for pruning in prunings:
        kept = pruned_tokens(seen, layouts_of(pair, pruning))
        pair.pruned.config.pruning_config = pruning
        with torch.no_grad():
            own = pair.pruned.model.get_image_features(**image_inputs(inputs))
        pair.pruned.config.pruning_config = {"method": "none"}
        for tokens, features, indices, layout in zip(
            kept, own.pooler_output, own.kept_indices, layouts_of(pair, pruning), strict=True
        ):
            assert torch.equal(tokens.features, features)
            assert torch.equal(tokens.encoded.kept_indices[0], indices)
            assert tokens.patches == len(layout.cells(indices))
            newlines = len(indices) - tokens.patches - layout.num_class_tokens
            assert tokens.newlines == newlines
            if not METHODS[pruning.method].counts_newlines:  # which may average some
                assert newlines == layout.num_newlines
            left_over.append(layout.num_retained - len(indices))
            assert not (pruning.exact_count and left_over[-1])
    assert any(left_over) or pair.family.name == "llava"  # whose single tiles have too few cells
    unpruned = pruned_tokens(seen, layouts_of(pair, VisualTokenPruningConfig(method="none")))
    with torch.no_grad():
        own = pair.stock.model.get_image_features(**image_inputs(inputs), return_dict=True)
    assert all(torch.equal(tokens.features, features) for tokens, features in zip(unpruned, own.pooler_output, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept[1:],  # a cell too few
        lambda kept: kept.flip(0),  # another order
        lambda kept: torch.cat((kept[:-1], kept[-2:-1])),  # one twice, and a newline missing
    ],
)
def test_a_broken_selection_is_noticed(change):
    layout = TokenLayout.from_image_size(60, 100, {"retention_ratio": 0.5}, **GEOMETRY, pinpoints=[[56, 112]])
    right = layout.kept_indices(layout.valid & (torch.arange(layout.num_cells) % 2 == 0))
    assert check_kept_indices(right, layout) == sum(layout.group_totals)
    with pytest.raises(ValueError, match="selector is broken"):
        check_kept_indices(change(right), layout)


def test_answers_are_those_of_the_plain_way(stock, tmp_path):
    data, methods = data_folder(tmp_path / "data"), "hivtp,hiprune,gprune,cls_attention,random,uniform"
    run = evaluated(stock, data, tmp_path / "runs", methods=methods, ratios="1,1/2,0.1", batch_size=3)
    pair = twins({"method": "none"}, family=open_source(str(stock)).config["model_type"])
    images, answers = dict(zip(SIZES, PHOTOS, strict=True)), set()
    predictions = table_of(run.folder / "predictions.csv")
    assert len(predictions) == len(ROWS) * (1 + 5 * 2 + 3 * 2)
    for line in predictions:
        image, question, _, _ = ROWS[int(line["row"]) - 1]
        assert (line["image"], line["question"]) == (image, question)
        pruning = {"method": line["method"]}
        if line["method"] != "none":
            pruning["retention_ratio"] = 0.5 if line["ratio"] == "0.5" else 0.1
        if line["seed"]:
            pruning["seed"] = int(line["seed"])
        answer, tokens = plain_answer(pair.pruned, pair.processor, images[image], question, pruning)
        assert (line["prediction"], int(line["patch_tokens"]) + int(line["newline_tokens"])) == (answer, tokens)
        answers.add(answer)
    assert len(answers) > len(ROWS)  # or equal answers would prove nothing


TOLD = {"token_weights": "cluster_size", "weight_strength": 0.5, "positions": "original"}


def test_answers_are_told_of_weights_and_places(stock, tmp_path):
    data = data_folder(tmp_path / "data")
    changes = [f"hivtp.{name}={value}" for name, value in TOLD.items()]
    changes += ["uniform.token_weights=inclusion", "gprune.token_weights=none"]
    options = {"methods": "hivtp,gprune,uniform", "ratios": "1/4", "batch_size": 3}
    run = evaluated(stock, data, tmp_path / "runs", changes=changes, **options)
    pair = twins({"method": "none"}, family=open_source(str(stock)).config["model_type"])
    images = dict(zip(SIZES, PHOTOS, strict=True))
    own = {"none": {}, "hivtp": TOLD, "gprune": {}, "uniform": {"token_weights": "inclusion"}}
    different = 0
    for line in table_of(run.folder / "predictions.csv"):
        image, question, _, _ = ROWS[int(line["row"]) - 1]
        pruning = {"method": line["method"], **({} if line["method"] == "none" else {"retention_ratio": 0.25})}
        answers = [
            plain_answer(pair.pruned, pair.processor, images[image], question, settings)[0]
            for settings in ({**pruning, **own[line["method"]]}, pruning)
        ]
        assert line["prediction"] == answers[0]
        different += answers[0] != answers[1]
    assert different > len(ROWS)  # or equal answers would prove nothing


def test_answers_are_told_of_stages(stock, tmp_path):
    """Inside the language model tokens go on leaving; a prefill is over when its last stage is."""
    stages = [[1, 0.5]]
    options = {"methods": "hivtp,random", "ratios": "1/2", "batch_size": 3, "changes": ["hivtp.stages=1:0.5"]}
    run = evaluated(stock, data_folder(tmp_path / "data"), tmp_path / "runs", **options)
    pair = twins({"method": "none"}, family=open_source(str(stock)).config["model_type"])
    images, different = dict(zip(SIZES, PHOTOS, strict=True)), 0
    for line in table_of(run.folder / "predictions.csv"):
        if line["method"] == "hivtp":
            image, question, _, _ = ROWS[int(line["row"]) - 1]
            with_stages, without = (
                plain_answer(pair.pruned, pair.processor, images[image], question, {"retention_ratio": 0.5, **told})[0]
                for told in ({"stages": stages}, {})
            )
            assert line["prediction"] == with_stages
            patches, newlines = int(line["patch_tokens"]), int(line["newline_tokens"])
            behind = newlines + patches - round(patches / 2)
            assert float(line["tokens_per_layer"]) == pytest.approx((patches + newlines + 2 * behind) / 3, rel=1e-5)
            different += with_stages != without
    assert different  # or equal answers would prove nothing


def test_one_run_has_the_answers_of_several_and_one_tower_pass(stock, tmp_path, monkeypatch):
    data, options = data_folder(tmp_path / "data"), {"methods": "hivtp,uniform", "ratios": "1/4", "batch_size": 3}
    named = {"published": {}, "weights": {"token_weights": "cluster_size"}, "positions": {"positions": "original"}}
    named["both"] = {**named["weights"], **named["positions"]}
    apart = {}
    for name, told in named.items():
        changes = [f"{method}.{setting}={value}" for method in ("hivtp", "uniform") for setting, value in told.items()]
        run = evaluated(stock, data, tmp_path / "apart", changes=changes, **options)
        for line in table_of(run.folder / "predictions.csv"):
            if line["method"] != "none":
                assert line["weights_and_positions"] == name
                apart[line["row"], line["method"], name] = line
    passes, see_images = [], answering.see
    monkeypatch.setattr(answering, "see", lambda *args: passes.append(args) or see_images(*args))
    run = evaluated(stock, data, tmp_path / "together", weights_and_positions=",".join(named), **options)
    assert len(passes) == 1  # of three images at once
    together = [line for line in table_of(run.folder / "predictions.csv") if line["method"] != "none"]
    assert {(line["row"], line["method"], line["weights_and_positions"]): line for line in together} == apart
    assert len({tuple(line["prediction"] for line in together if line["weights_and_positions"] == name) for name in named}) == 4
    rows = [(row.method, row.weights_and_positions) for row in run.metrics if row.question_type == "all"]
    assert rows == [("none", "published"), *((method, name) for method in ("hivtp", "uniform") for name in named)]


def test_prompts_are_the_processors():
    pair = twins({"method": "uniform", "retention_ratio": 0.25})
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    for start in ("", "<s>"):  # a template may write the first token itself
        pair.processor.chat_template = start + pair.stock_processor.chat_template
        inputs = pair.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": PHOTOS[0]}, *chat[0]["content"][1:]]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt = prompt_of(pair.processor, "How many?")
        tokens = int((inputs.input_ids == 3).sum())
        assert prompt.ids(tokens) == inputs.input_ids[0].tolist()
    text = pair.processor.apply_chat_template(chat, add_generation_prompt=True).replace("<image>", "")
    without = pair.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.ids(0) == without


def test_base_only_is_the_base_tile():
    pair = twins({"method": "none"})
    inputs = inputs_of(pair)
    seen = see(pair.pruned, inputs, [])
    layouts = layouts_of(pair, VisualTokenPruningConfig(method="none"))
    for tokens, features, layout in zip(base_tile_tokens(seen, layouts), seen.features, layouts, strict=True):
        assert (tokens.patches, tokens.newlines) == (64, 0)
        positions = [int(p) for p in layout.cell_positions if int(layout.cells(p[None])[0, 0]) == 0]
        assert torch.equal(tokens.features, features[positions])


def test_tiles_that_keep_their_size_are_packed_as_stock_packs_them(pair):
    """Shrunk to as many cells as they have, images give stock's own features, newlines and un-padding included."""
    inputs = inputs_of(pair)
    layouts = layouts_of(pair, VisualTokenPruningConfig(method="none"))
    with torch.no_grad():
        own = pair.stock.model.get_image_features(**image_inputs(inputs), return_dict=True).pooler_output
    for tokens, features, layout in zip(shrunken_tokens(pair.pruned, inputs, layouts, 8), own, layouts, strict=True):
        torch.testing.assert_close(tokens.features, features, rtol=1e-5, atol=1e-5)
        assert tokens.patches == layout.num_stock - layout.num_newlines - layout.num_class_tokens
        assert tokens.newlines == layout.num_newlines


@pytest.mark.parametrize(("grid", "expected"), [(1, [(5, 2), (3, 2), (5, 2)]), (4, [(48, 4), (32, 8), (80, 8)])])
def test_shrunken_images_have_fewer_tokens(grid, expected):
    """The base tile, and rows of crops that un-padding leaves of 2 x 2, 2 x 1 and 2 x 2 tiles."""
    pair = twins({"method": "none"})
    layouts = layouts_of(pair, VisualTokenPruningConfig(method="none"))
    kept = shrunken_tokens(pair.pruned, inputs_of(pair), layouts, grid)
    assert [(tokens.patches, tokens.newlines) for tokens in kept] == expected
    assert [len(tokens.features) for tokens in kept] == [sum(counts) for counts in expected]


def test_shrinking_sees_the_whole_image():
    """A bright half stays a bright half: what is fed to the tower is the image itself, smaller."""
    pair = twins({"method": "none"}, family="llava")
    fed = []
    tower = pair.pruned.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    pixels = torch.zeros(1, 3, 56, 56)
    pixels[..., 28:] = 1
    layouts = layouts_of(pair, VisualTokenPruningConfig(method="none"), PHOTOS[:1])
    shrunken_tokens(pair.pruned, {"pixel_values": pixels}, layouts, 4)
    hook.remove()
    assert fed[0].shape == (1, 3, 28, 28)
    assert fed[0][..., :10].abs().max() < 0.1
    assert (fed[0][..., -10:] - 1).abs().max() < 0.1


def test_an_image_is_encoded_once(tmp_path, monkeypatch):
    checkpoint = build_stock_checkpoint(tmp_path / "checkpoint", **GEOMETRY)
    tiles, original = [], CheckpointSource.load_model

    def watched(*arguments, **options):
        model = original(*arguments, **options)
        model.model.vision_tower.register_forward_hook(lambda module, args, output: tiles.append(tuple(args[0].shape)))
        return model

    monkeypatch.setattr(CheckpointSource, "load_model", watched)
    methods = "hivtp,hiprune,gprune,cls_attention,random,base-only,downsample"
    evaluated(checkpoint, data_folder(tmp_path / "data"), tmp_path / "runs", methods=methods, ratios="1/2,1/4", batch_size=2)
    layout = functools.partial(TokenLayout.from_image_size, pruning={"method": "none"}, **GEOMETRY)
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    total = sum(layout(height, width, pinpoints=pinpoints).num_views for height, width in SIZES.values())
    sides = [shape[-1] for shape in tiles]
    assert sorted(set(sides)) == [4 * 7, 5 * 7, 56]
    for side in set(sides):
        assert sum(shape[0] for shape in tiles if shape[-1] == side) == total
