"""Qwen2.5-VL and Qwen3-VL against stock's language model on what is left of embeddings, positions and DeepStack rows."""

import copy
import sys
import threading

import pytest
import torch
from transformers import AttentionInterface, QuantoConfig
from transformers.vision_utils import get_vision_window_index

from hivtp_hf import VisualTokenPruningConfig
from hivtp_hf.families.qwen2_5_vl import Qwen2_5_VLFamily
from hivtp_hf.pruning.compat import cache_argument, cache_of, prefills_images_in_chunks
from hivtp_hf.pruning.evidence import methods_of
from hivtp_hf.pruning.registry import METHODS
from tiny_qwen import (
    CONFIGS,
    IMAGE,
    OURS,
    TEXT_TOKENS,
    images_of,
    inputs_of,
    oracle,
    oracle_greedy,
    oracle_logits,
    prompt_of,
    qwen_twins,
)

FAMILIES = tuple(OURS)
METHODS_THAT_CAN = methods_of(Qwen2_5_VLFamily.provides)


def settings_of(method):
    return {"method": method} if METHODS[method].keeps_everything else {"method": method, "retention_ratio": 0.4}


# What drops tokens inside the language model is held against a plain loop over its layers (tests/support/places_reference.py).
METHODS_WITHOUT_STAGES = [
    method for method in METHODS_THAT_CAN if not VisualTokenPruningConfig(**settings_of(method)).drops_in_stages
]
ONE = [[5, (8, 12), 7]]
TWO = [[3, (8, 12), 2, (20, 6), 6]]
BATCH = [[5, (8, 12), 7], [3, (4, 4), 2, (20, 6), 9], [4]]


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request):
    return qwen_twins(request.param)


@pytest.fixture(autouse=True)
def start_over(request):
    """Settings are changed on the models that tests share."""
    if "twins" in request.fixturenames:
        request.getfixturevalue("twins").pruned.config.pruning_config = {"retention_ratio": 0.4}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def greedy(twins, inputs, number=6, **options):
    generated = twins.pruned.generate(**inputs, max_new_tokens=number, do_sample=False, **options)
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("method", METHODS_WITHOUT_STAGES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [ONE, TWO, BATCH], ids=["one", "two", "batch"])
def test_logits_equal_the_oracle(twins, rows, side, method):
    twins.pruned.config.pruning_config = settings_of(method)
    stock, pruned = inputs_of(twins, rows, side)
    is_token = pruned["attention_mask"].bool()
    expected = oracle_logits(twins, stock, pruned)[is_token]
    torch.testing.assert_close(logits(twins.pruned, pruned)[is_token], expected, atol=1e-5, rtol=1e-5)


def test_a_ratio_of_one_is_stock(twins):
    twins.pruned.config.pruning_config = {"retention_ratio": 1}
    stock, pruned = inputs_of(twins, BATCH)
    assert torch.equal(logits(twins.pruned, pruned), logits(twins.stock, stock))
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        generated = [
            model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
            for model, inputs in ((twins.pruned, pruned), (twins.stock, stock))
        ]
        assert torch.equal(*generated)


@pytest.mark.parametrize("rows", [ONE, TWO, BATCH], ids=["one", "two", "batch"])
def test_greedy_answers_equal_the_oracle(twins, rows):
    stock, pruned = inputs_of(twins, rows)
    assert greedy(twins, pruned) == oracle_greedy(twins, stock, pruned, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prefill_chunk_size": 9},
    ],
    ids=str,
)
def test_other_ways_to_generate(twins, options):
    rows = ONE if "prompt_lookup_num_tokens" in options else BATCH
    _, pruned = inputs_of(twins, rows)
    if "prefill_chunk_size" in options and not prefills_images_in_chunks():
        with pytest.raises(ValueError, match=r"The first release that works is 5\.23\.0"):
            greedy(twins, pruned, **options)
        return
    expected = greedy(twins, pruned)
    if "num_beams" not in options:
        assert greedy(twins, pruned, **options) == expected
        return
    # Beams of a batch are those of its rows alone.
    together = greedy(twins, pruned, **options)
    for row in range(len(rows)):
        _, alone = inputs_of(twins, [BATCH[row]]) if any(isinstance(part, tuple) for part in BATCH[row]) else (None, None)
        if alone is None:
            continue
        count = alone["input_ids"].shape[1]
        alone["input_ids"] = pruned["input_ids"][row : row + 1, -count:]
        alone["pixel_values"], alone["image_grid_thw"] = images_of_row(pruned, row)
        assert greedy(twins, alone, **options) == together[3 * row : 3 * row + 3]


def images_of_row(inputs, row):
    """The images of one row of `BATCH`."""
    first, number = ((0, 1), (1, 2))[row]
    lengths = inputs["image_grid_thw"].prod(1).tolist()
    pixels = inputs["pixel_values"].split(lengths)[first : first + number]
    return torch.cat(pixels), inputs["image_grid_thw"][first : first + number]


def test_sampling_with_several_returns(twins):
    _, pruned = inputs_of(twins, BATCH)
    torch.manual_seed(3)
    generated = twins.pruned.generate(**pruned, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in pruned.items() if name[:5] not in ("pixel", "image")}
    rows = [row for row in BATCH for _ in range(2)]
    images = [images_of_row(pruned, row) for row in (0, 0, 1, 1)]
    repeated["pixel_values"] = torch.cat([pixels for pixels, _ in images])
    repeated["image_grid_thw"] = torch.cat([grids for _, grids in images])
    torch.manual_seed(3)
    assert torch.equal(twins.pruned.generate(**repeated, max_new_tokens=4, do_sample=True), generated)
    assert len(rows) == len(generated)


def test_an_assistant_of_the_same_family(twins):
    _, pruned = inputs_of(twins, ONE)
    assert greedy(twins, pruned, assistant_model=copy.deepcopy(twins.pruned)) == greedy(twins, pruned)


def test_ratios_of_images(twins):
    stock, pruned = inputs_of(twins, BATCH, ratio=[1.0, 0.2, 0.7])
    is_token = pruned["attention_mask"].bool()
    expected = oracle_logits(twins, stock, pruned)[is_token]
    torch.testing.assert_close(logits(twins.pruned, pruned)[is_token], expected, atol=1e-5, rtol=1e-5)
    assert greedy(twins, pruned) == oracle_greedy(twins, stock, pruned, 6)


def by_hand(model, inputs, number, cache=None):
    """Greedy ids of one row, by a loop that a user may write; and the cache."""
    name = cache_argument(type(model).forward)
    answer, given = [], dict(inputs)
    with torch.no_grad():
        for _ in range(number):
            output = model(**given, **({} if cache is None else {name: cache}), use_cache=True)
            cache = cache_of(output)
            answer.append(int(output.logits[0, -1, :TEXT_TOKENS].argmax()))
            mask = inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            given = {"input_ids": torch.tensor([answer[-1:]]), "attention_mask": mask}
    return answer, cache


def test_loops_by_hand_and_prompts_in_turn(twins):
    """Stock keeps on the model how far positions run ahead, and goes wrong when prompts alternate."""
    prompts = [inputs_of(twins, rows)[1] for rows in (ONE, TWO)]
    expected = [greedy(twins, prompt)[0] for prompt in prompts]
    firsts = [by_hand(twins.pruned, dict(prompt), 3) for prompt in prompts]
    for prompt, (begun, cache), whole in zip(prompts, firsts, expected, strict=True):
        assert begun == whole[:3]
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 3), value=1)
        rest, _ = by_hand(twins.pruned, {"input_ids": torch.tensor([begun[-1:]]), "attention_mask": mask}, 3, cache)
        assert rest == whole[3:]
    assert twins.pruned.model.rope_deltas is None


@pytest.mark.parametrize("grid", [None, (12, 4)], ids=["text", "a new image"])
def test_a_second_turn_on_a_kept_cache(twins, grid):
    _, first = inputs_of(twins, ONE)
    begun = twins.pruned.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = [[4]] if grid is None else [[2, grid, 4]]
    _, second = inputs_of(twins, more) if grid else (None, prompt_of(more))
    # The cache lacks the last token that was generated.
    ids = torch.cat((begun.sequences, second["input_ids"]), dim=1)
    types = (ids == IMAGE).long()
    images = {name: second[name] for name in ("pixel_values", "image_grid_thw") if name in second}
    name = cache_argument(type(twins.pruned).forward)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **images}
    kept_cache = twins.pruned.generate(**again, **{name: cache_of(begun)}, max_new_tokens=4, do_sample=False)
    # From the start, with all images.
    if images:
        images = {part: torch.cat((first[part], second[part])) for part in images}
    else:
        images = {part: first[part] for part in ("pixel_values", "image_grid_thw")}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **images}
    assert torch.equal(kept_cache, twins.pruned.generate(**whole, max_new_tokens=4, do_sample=False))


def test_training_gets_the_oracles_gradients(twins):
    stock, pruned = inputs_of(twins, BATCH)
    labels = pruned["input_ids"].masked_fill(pruned["attention_mask"] == 0, -100)
    model = copy.deepcopy(twins.pruned).train()
    loss = model(**pruned, labels=labels).loss
    loss.backward()
    expected = twins.stock.loss_function(oracle_logits(twins, stock, pruned), labels, model.config.text_config.vocab_size)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "visual.blocks" in name)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**pruned, labels=labels).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "visual.blocks" in name)


def test_copies_threads_and_bfloat16(twins):
    _, pruned = inputs_of(twins, BATCH)
    expected = logits(twins.pruned, pruned)
    assert torch.equal(logits(copy.deepcopy(twins.pruned), pruned), expected)
    others = [inputs_of(twins, rows)[1] for rows in (ONE, TWO)]
    alone, found = [logits(twins.pruned, inputs) for inputs in others], {}

    def run(number):
        found[number] = logits(twins.pruned, others[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(2))
    low = copy.deepcopy(twins.pruned).to(torch.bfloat16)
    assert logits(low, pruned).isfinite().all()


def test_compiled(twins):
    stock, pruned = inputs_of(twins, ONE)
    compiled = torch.compile(twins.pruned, backend="eager")
    torch.testing.assert_close(logits(compiled, pruned), oracle_logits(twins, stock, pruned), atol=1e-5, rtol=1e-5)


def test_videos_pass_whole(twins):
    """By tensors made by hand, as a video processor needs torchvision."""
    _, pruned = inputs_of(twins, ONE)
    grid = (1, 4, 8) if twins.family == "qwen3_vl" else (2, 4, 8)
    video = images_of([(4, 8)] if twins.family == "qwen3_vl" else [(8, 8)], twins.stock, seed=5)["pixel_values"]
    number = grid[0] * 8

    def with_video(inputs):
        ids = torch.cat((inputs["input_ids"], prompt_of([[3, [number], 4]])["input_ids"]), dim=1)
        placeholders = (ids == IMAGE).nonzero()[-number:]
        ids[placeholders[:, 0], placeholders[:, 1]] = twins.stock.config.video_token_id
        types = (ids == IMAGE).long() + 2 * (ids == twins.stock.config.video_token_id).long()
        videos = {"pixel_values_videos": video, "video_grid_thw": torch.tensor([grid])}
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **videos}

    stock, pruned = inputs_of(twins, ONE)
    features = twins.pruned.get_video_features(video, torch.tensor([grid]), return_dict=True)
    expected = twins.stock.get_video_features(video, torch.tensor([grid]), return_dict=True)
    assert all(map(torch.equal, features.pooler_output, expected.pooler_output))
    assert logits(twins.pruned, with_video(pruned)).isfinite().all()
    twins.pruned.config.pruning_config = {"retention_ratio": 1}
    assert torch.equal(logits(twins.pruned, with_video(stock)), logits(twins.stock, with_video(stock)))
    answers = [model.generate(**with_video(stock), max_new_tokens=4, do_sample=False) for model in (twins.pruned, twins.stock)]
    assert torch.equal(*answers)


def test_what_cannot_be_right_is_refused(twins):
    _, pruned = inputs_of(twins, ONE)
    without = {name: value for name, value in pruned.items() if name != "mm_token_type_ids"}
    for call in (twins.pruned, twins.pruned.generate):
        with pytest.raises(ValueError, match="without `mm_token_type_ids`; without them its tokens have no places"):
            call(**without)
    with pytest.raises(ValueError, match=r"`pixel_values` holds \d+ patches"):
        twins.pruned(**{**pruned, "pixel_values": pruned["pixel_values"][:-4]})
    with pytest.raises(ValueError, match="without `image_grid_thw`"):
        twins.pruned.get_image_features(pruned["pixel_values"])
    with pytest.raises(ValueError, match="placeholders, but the model keeps"):
        twins.pruned(**inputs_of(twins, ONE)[0])


def test_layers_that_attend_within_windows_are_refused():
    config, model = OURS["qwen2_5_vl"]
    with pytest.raises(
        ValueError, match=r"layers \[0\], which attend within windows.*Layers over the whole image are \[1, 2, 3\]"
    ):
        model(config(**CONFIGS["qwen2_5_vl"], pruning_config={"importance_layers": [0, 2]}))


def test_default_layers():
    config, _ = OURS["qwen2_5_vl"]
    facts = config.family.encoder_facts(config(), {})
    assert VisualTokenPruningConfig().scored_layers(facts) == (15, 23)
    assert VisualTokenPruningConfig("hiprune").scored_layers(facts) == [15, 31]
    for family, layers, of_hiprune in (("qwen3_vl", (7, 8, 9), [9, 26]), ("qwen2_vl", (8, 9, 10), [11, 31])):
        config, _ = OURS[family]
        facts = config.family.encoder_facts(config(), {})
        assert VisualTokenPruningConfig().scored_layers(facts) == layers
        assert VisualTokenPruningConfig("hiprune").scored_layers(facts) == of_hiprune


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_stocks_own_maps(family, monkeypatch):
    """In the order of cells, which the tower of Qwen2.5-VL has in the order of its windows."""
    twins = qwen_twins(family)
    module = sys.modules[type(twins.stock.model.visual).__module__]
    maps, eager = {}, module.eager_attention_forward

    def recording(attention, *args, **kwargs):
        output, weights = eager(attention, *args, **kwargs)
        maps.setdefault(attention, []).append(weights)
        return output, weights

    given = images_of([(8, 12), (20, 6), (4, 4), (26, 30)], twins.stock)
    monkeypatch.setattr(module, "eager_attention_forward", recording)
    twins.stock.model.visual.set_attn_implementation("eager")
    with torch.no_grad():
        twins.stock.get_image_features(**given, return_dict=True)
    look = twins.pruned.look(given, layers=[1, 3])
    layouts = look.layouts({"method": "none"})
    for layer, found in look.received.items():
        received = torch.cat([of_image.mean((0, 1, 2)) for of_image in maps[twins.stock.model.visual.blocks[layer].attn]])
        expected = received.view(-1, 4).mean(1)
        if family == "qwen2_5_vl":
            vision = twins.stock.config.vision_config
            window_index, _ = get_vision_window_index(
                given["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
            )
            expected = expected[window_index.argsort()]
        assert len(found) == sum(layout.num_cells for layout in layouts)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_positions_of_a_pruned_prompt_need_its_images(twins):
    stock, pruned = inputs_of(twins, ONE)
    names = ("mm_token_type_ids", "image_grid_thw")
    positions, _ = twins.pruned.model.get_rope_index(stock["input_ids"], **{name: stock[name] for name in names})
    expected, _ = twins.stock.model.get_rope_index(stock["input_ids"], **{name: stock[name] for name in names})
    assert torch.equal(positions, expected)
    with pytest.raises(ValueError, match="Where kept tokens stand is known once images are encoded"):
        twins.pruned.model.get_rope_index(pruned["input_ids"], **{name: pruned[name] for name in names})


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_engines_get_positions_of_methods_that_look_at_no_image(twins, method):
    """Before anything is encoded."""
    twins.pruned.config.pruning_config = {"method": method, "retention_ratio": 0.3}
    for rows in (ONE, BATCH):
        stock, pruned = inputs_of(twins, rows)
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, deltas = twins.pruned.model.get_rope_index(pruned["input_ids"], **{name: pruned[name] for name in names})
        expected = oracle(twins, stock, pruned)["position_ids"]
        is_token = pruned["attention_mask"].bool()
        assert torch.equal(positions[:, is_token], expected[:, is_token])
        # The next token stands one behind the furthest.
        furthest = torch.stack(
            [of_row[:, row_mask].max() for of_row, row_mask in zip(expected.unbind(1), is_token, strict=True)]
        )
        assert torch.equal(deltas.flatten() + is_token.sum(1), furthest + 1)


def test_layouts_are_asked_for_once_a_call(twins, monkeypatch):
    _, pruned = inputs_of(twins, BATCH)
    asked, family = [], type(twins.pruned.model.family)
    original = family.layout
    monkeypatch.setattr(family, "layout", lambda self, *args: asked.append(args[1]) or original(self, *args))
    greedy(twins, pruned)
    assert len(asked) == 3
    logits(twins.pruned, pruned)
    assert len(asked) == 6


def test_an_adapter_is_trained(twins):
    """On the language model and in the tower, whose scores it changes."""
    peft = pytest.importorskip("peft", reason="the adapter tests need peft")
    _, pruned = inputs_of(twins, BATCH)
    labels = pruned["input_ids"].masked_fill(pruned["attention_mask"] == 0, -100)
    before = logits(twins.pruned, pruned)
    settings = peft.LoraConfig(target_modules=r".*(language_model.*(q|v)_proj|visual\.blocks\.[0-2]\.attn\.qkv)", r=4)
    model = peft.get_peft_model(copy.deepcopy(twins.pruned), settings)
    model(**pruned, labels=labels).loss.backward()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora" in name and weight.grad is not None for name, weight in adapters.items())
    torch.optim.SGD(adapters.values(), lr=1.0).step()
    model.eval()
    after = logits(model, pruned)
    assert not torch.equal(after, before)
    torch.testing.assert_close(logits(model.merge_and_unload(), pruned), after, atol=1e-3, rtol=1e-3)


def test_weights_on_disk_and_quantised_weights(twins, tmp_path):
    stock, pruned = inputs_of(twins, ONE)
    expected = logits(twins.pruned, pruned)
    twins.pruned.save_pretrained(tmp_path / "ours")
    twins.stock.save_pretrained(tmp_path / "stock")
    size = (tmp_path / "ours" / "model.safetensors").stat().st_size
    load = type(twins.pruned).from_pretrained
    offloaded = load(
        tmp_path / "ours", device_map="auto", max_memory={"cpu": int(0.4 * size)}, offload_folder=tmp_path / "offloaded"
    )
    assert "disk" in offloaded.hf_device_map.values()
    torch.testing.assert_close(logits(offloaded, pruned), expected, atol=1e-5, rtol=1e-5)
    config = QuantoConfig(weights="int8")
    quantised = load(tmp_path / "ours", quantization_config=config)
    assert type(quantised.model.visual.blocks[1].attn.qkv) is not torch.nn.Linear
    of_stock = type(twins.stock).from_pretrained(tmp_path / "stock", quantization_config=config)
    again = twins._replace(stock=of_stock, pruned=quantised)
    torch.testing.assert_close(logits(quantised, pruned), oracle_logits(again, stock, pruned), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_that_would_answer_wrongly_are_refused(twins, engine, monkeypatch):
    """When they build the model; they can be told by what they call their attention."""
    monkeypatch.setitem(AttentionInterface._global_mapping, engine, AttentionInterface._global_mapping["sdpa"])

    def built(**pruning):
        config = copy.deepcopy(twins.pruned.config)
        config.pruning_config = pruning
        config.get_text_config()._attn_implementation = engine
        with torch.device("meta"):
            return type(twins.pruned.model)(config)

    if twins.family == "qwen3_vl":
        for ratio in (0.4, 1.0):
            with pytest.raises(ValueError, match=f"Qwen3-VL runs in {engine}.*`deepstack_features`.*dropped, pruned or not"):
                built(retention_ratio=ratio)
        return
    refusal = f"runs in {engine}.*positions are asked for before.*'uniform', 'random'.*`hivtp serve`"
    for pruning in ({"retention_ratio": 0.4}, {"token_budget": 50}, {"method": "spread", "retention_ratio": 0.4}):
        with pytest.raises(ValueError, match=refusal):
            built(**pruning)
    for pruning in ({"retention_ratio": 1}, {"method": "none"}, {"method": "uniform", "retention_ratio": 0.4}):
        assert built(**pruning).config.get_text_config()._attn_implementation == engine
