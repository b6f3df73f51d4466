"""Scores: equal to attention maps computed in full, under every implementation, and nobody notices that they are taken."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forked import run_together
from hivtp_hf.pruning import attention_scores as attention_reduction
from hivtp_hf.pruning.attention_interface import CollectedAttention, RowsWanted, attach
from hivtp_hf.pruning.attention_scores import attention_of_rows, received_attention
from hivtp_hf.pruning.evidence import mean_of_layers
from nightly import mostly_nightly
from tiny_checkpoint import tiny_config

LAYERS = (1, 2, 4)
TOWERS = ["clip_vision_model", "siglip_vision_model"]


def tower_of(vision_type="clip_vision_model", implementation="sdpa", dtype=torch.float32):
    config = tiny_config(tile_size=56, patch_size=7, vision_layers=5, vision_type=vision_type).vision_config
    torch.manual_seed(0)
    tower = AutoModel.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(std=0.3)  # default weights give almost uniform attention, which would hide mistakes
    return tower.to(dtype)


def pixels(number=3, dtype=torch.float32):
    return torch.randn(number, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(dtype)


def attention_modules(tower):
    return [module for module in tower.modules() if type(module).__name__ in ("CLIPAttention", "SiglipAttention")]


def full_maps(tower, images, from_class_token=False):
    """Received attention per layer, from the outputs of q_proj and k_proj and whole float32 maps."""
    modules = attention_modules(tower)
    outputs = {}
    hooks = [
        projection.register_forward_hook(lambda module, args, output: outputs.__setitem__(module, output.float()))
        for module in modules
        for projection in (module.q_proj, module.k_proj)
    ]
    with torch.no_grad():
        tower(images)
    for hook in hooks:
        hook.remove()
    received = []
    for module in modules:
        query, key = (
            outputs[projection].unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj)
        )
        maps = torch.softmax(query @ key.transpose(-1, -2) * module.scale, dim=-1)
        rows = maps[:, :, :1] if from_class_token else maps
        received.append(rows.mean(dim=(1, 2)))
    return received


def scores(tower, tap, images, layers=LAYERS, from_class_token=False):
    collector = CollectedAttention((), layers) if from_class_token else CollectedAttention(layers)
    with torch.no_grad():
        tap.call(tower, collector, images)
    return mean_of_layers(by_layer(collector))


def by_layer(collector):
    """The scores of layers that are called once in a pass."""
    found = collector.received() or collector.class_attention()
    assert all(len(calls) == 1 for calls in found.values())
    return {layer: calls[0] for layer, calls in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("vision_type", TOWERS)
def test_scores_equal_full_attention_maps(vision_type, implementation, dtype):
    tower = tower_of(vision_type, implementation, dtype)
    images = pixels(dtype=dtype)
    expected = full_maps(tower, images)
    assert max(float(layer.std()) for layer in expected) > 1e-3  # far from uniform
    tap = attach(tower, 5)
    got = scores(tower, tap, images)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, sum(expected[layer] for layer in LAYERS) / 3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_from_the_class_token_equal_its_row(implementation, dtype):
    tower = tower_of("clip_vision_model", implementation, dtype)
    images = pixels(dtype=dtype)
    expected = full_maps(tower, images, from_class_token=True)
    tap = attach(tower, 5)
    for layer in LAYERS:
        got = scores(tower, tap, images, (layer,), from_class_token=True)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected[layer], atol=1e-5, rtol=0)
        torch.testing.assert_close(got.sum(1), torch.ones(3))
        # Far from what all tokens attend to, so that the one is not taken for the other.
        assert float((got - scores(tower, tap, images, (layer,))).abs().max()) > 1e-3
    with torch.no_grad():
        collector = CollectedAttention((), LAYERS)
        assert torch.equal(tap.call(tower, collector, images).last_hidden_state, tower(images).last_hidden_state)
    assert list(by_layer(collector)) == list(LAYERS)


@pytest.mark.parametrize(("vision_type", "forwards"), [("clip_vision_model", True), ("siglip_vision_model", False)])
def test_how_the_collector_travels(vision_type, forwards):
    assert attach(tower_of(vision_type), 5).forwards_keywords is forwards


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("vision_type", TOWERS)
def test_the_tower_computes_what_it_did(vision_type, implementation):
    stock, tower = tower_of(vision_type, implementation), tower_of(vision_type, implementation)
    tap = attach(tower, 5)
    with torch.no_grad():
        expected = stock(pixels()).last_hidden_state
        assert torch.equal(tower(pixels()).last_hidden_state, expected)
        collector = CollectedAttention(LAYERS)
        assert torch.equal(tap.call(tower, collector, pixels()).last_hidden_state, expected)


# As it is, and as the code that torch makes of it, which takes long.
@pytest.mark.parametrize("stance", mostly_nightly(("force_eager", "default"), lambda stance: stance == "force_eager"))
def test_flex_attention_reports_too(stance):
    tower = tower_of()
    tap = attach(tower, 5)
    expected = scores(tower, tap, pixels())
    tower.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance(stance):
        got = scores(tower, tap, pixels())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_implementation_behind_sees_the_real_module():
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.is_causal, "hivtp_received_attention" in kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy_attention", spy)
    try:
        tower = tower_of()
        tap = attach(tower, 5)
        tower.set_attn_implementation("spy_attention")
        assert tower.config._attn_implementation == "spy_attention"
        scores(tower, tap, pixels())
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["spy_attention"]
    assert seen == [("spy_attention", False, False)] * 5


def test_eager_maps_can_still_be_asked_for():
    tower = tower_of(implementation="eager")
    attach(tower, 5)
    with torch.no_grad():
        maps = tower(pixels(), output_attentions=True).attentions
    assert len(maps) == 5
    torch.testing.assert_close(torch.stack([layer.mean(dim=(1, 2)) for layer in maps]), torch.stack(full_maps(tower, pixels())))


def test_a_silent_layer_is_an_error():
    tower = tower_of()
    tap = attach(tower, 5)
    attention_modules(tower)[2].config = tower.config  # as a library would that swaps modules
    with pytest.raises(ValueError, match=r"layers \[2\] ran without reporting"):
        scores(tower, tap, pixels())


@pytest.mark.parametrize("vision_type", TOWERS)
def test_nothing_is_kept_between_calls(vision_type):
    tower = tower_of(vision_type)
    tap = attach(tower, 5)
    first = scores(tower, tap, pixels(), layers=(0,))
    second = scores(tower, tap, pixels(), layers=(3,))
    expected = full_maps(tower, pixels())
    torch.testing.assert_close(first, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(second, expected[3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("vision_type", TOWERS)
def test_copies_report_for_themselves(vision_type, twin):
    tower = tower_of(vision_type)
    tap = attach(tower, 5)
    copied = twin(tower)
    assert attention_modules(copied)[0].config._hivtp_config is copied.config
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    expected = full_maps(copied, pixels())
    torch.testing.assert_close(scores(copied, tap, pixels(), layers=(2,)), expected[2], atol=1e-5, rtol=0)
    copied.set_attn_implementation("eager")
    assert tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("vision_type", TOWERS)
def test_gradients_flow_past_the_scores(vision_type):
    stock, tower = tower_of(vision_type), tower_of(vision_type)
    tap = attach(tower, 5)
    stock(pixels()).last_hidden_state.sum().backward()
    collector = CollectedAttention(LAYERS)
    tap.call(tower, collector, pixels()).last_hidden_state.sum().backward()
    assert not mean_of_layers(by_layer(collector)).requires_grad
    for expected, got in zip(stock.parameters(), tower.parameters(), strict=True):
        assert (expected.grad is None and got.grad is None) or torch.equal(expected.grad, got.grad)


def test_autocast_does_not_round_the_scores():
    query, key = (torch.randn(2, 4, 65, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = received_attention(query, key, 0.4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (query @ key.transpose(-1, -2)).dtype == torch.bfloat16
        assert torch.equal(received_attention(query, key, 0.4, 4), expected)


MEMORY_PROGRAM = """
import resource
import sys
import torch
from hivtp_hf.pruning.attention_scores import received_attention

torch.set_num_threads(2)
query, key = (torch.randn(5 * int(sys.argv[1]), 577, 16, 64).transpose(1, 2) for _ in range(2))
received_attention(query[:1], key[:1], 0.125, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
received_attention(query, key, 0.125, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


# A whole map of CLIP-L/336 takes 20 MiB a tile and layer: 1.6 GiB of sixteen images of five tiles, 0.4 GiB of four.
@pytest.mark.parametrize("images", mostly_nightly((4, 16), lambda images: images == 4))
def test_scoring_large_images_takes_little_memory(images):
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(images)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 256


@pytest.mark.parametrize("chunk_bytes", [64, 4 * 65, 4 * 65 * 65, 4 * 65 * 65 * 5, 2**30])
@pytest.mark.parametrize("rows", [65, 1], ids=["all tokens", "class token"])
def test_every_way_to_chunk_gives_the_same(chunk_bytes, rows, monkeypatch):
    query, key = (torch.randn(3, 4, 65, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    query = query[:, :, :rows]
    expected = torch.softmax(query @ key.transpose(-1, -2) * 0.4, dim=-1).mean(dim=(1, 2))
    monkeypatch.setattr(attention_reduction, "_CPU_CHUNK_BYTES", chunk_bytes)
    torch.testing.assert_close(received_attention(query, key, 0.4, 4), expected, atol=1e-6, rtol=0)


def some_rows(sequences=3, tokens=65, number=7):
    """Rows of every sequence, some of them twice, and weights, some of them 0."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, tokens, (sequences, number), generator=generator)
    weights = torch.rand(sequences, number, generator=generator)
    weights[:, -2:] = 0
    return rows, weights


def plain_rows(query, key, scaling, rows, weights):
    maps = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1).mean(1)
    return torch.stack(
        [
            sum(weight * of_sequence[row] for row, weight in zip(rows_of, weights_of, strict=True))
            for of_sequence, rows_of, weights_of in zip(maps, rows, weights, strict=True)
        ]
    )


@pytest.mark.parametrize("chunk_bytes", [64, 4 * 65, 4 * 65 * 5, 4 * 65 * 7 * 5, 2**30])
def test_rows_of_chosen_tokens_in_every_way_to_chunk(chunk_bytes, monkeypatch):
    query, key = (torch.randn(3, 4, 65, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rows, weights = some_rows()
    before = weights.clone()
    expected = plain_rows(query, key, 0.4, rows, weights)
    monkeypatch.setattr(attention_reduction, "_CPU_CHUNK_BYTES", chunk_bytes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_of_rows(query, key, 0.4, 4, rows, weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_rows_are_chosen_by_what_a_sequence_receives(class_tokens):
    """Over several calls of a layer, with class tokens in the shares of attention and nowhere else."""
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(3, 4, 20, 8, generator=generator) for _ in range(2))
    asked = []

    def choose(received, first):
        asked.append((first, received))
        rows = received.argmax(1, keepdim=True)
        return rows, torch.full(rows.shape, 0.5)

    collector = CollectedAttention(rows={"half": RowsWanted((1,), choose)}, class_tokens=class_tokens)
    assert collector.layers == (1,)
    collector.reduce(0, query, key, 0.4, 4)
    for part in (slice(0, 2), slice(2, 3)):
        collector.reduce(1, query[part], key[part], 0.4, 4)
    found = torch.cat(collector.rows()["half"][1])
    cells = torch.softmax(query @ key.transpose(-1, -2) * 0.4, dim=-1).mean(1)[:, class_tokens:, class_tokens:]
    assert [first for first, _ in asked] == [0, 2]
    torch.testing.assert_close(torch.cat([received for _, received in asked]), cells.mean(1), atol=1e-6, rtol=0)
    best = cells.mean(1).argmax(1)
    torch.testing.assert_close(found, 0.5 * cells[torch.arange(3), best], atol=1e-6, rtol=0)


def test_rows_of_a_silent_layer_are_an_error():
    with pytest.raises(ValueError, match=r"layers \[4\] ran without reporting"):
        CollectedAttention(rows={"any": RowsWanted((4,), lambda received, first: (received, received))}).rows()


# Every patch of an image of 4000 x 3000 pixels in a Qwen-VL tower is a token: a whole map of one head takes 14 GiB.
ROWS_PROGRAM = """
import resource
import torch
from hivtp_hf.methods.vflowopt import attention_sinks
from hivtp_hf.pruning.attention_scores import attention_of_rows, received_attention

torch.set_num_threads(2)
tokens = 284 * 214
query, key = (torch.randn(1, 2, tokens, 8) for _ in range(2))
small = received_attention(query[:, :, :100], key[:, :, :100], 0.125, 2)
attention_of_rows(query[:, :, :100], key[:, :, :100], 0.125, 2, *attention_sinks(small, [20.0]))
received = key.norm(dim=-1).mean(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = attention_of_rows(query, key, 0.125, 2, *attention_sinks(received, [28.7]))
assert rows.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_rows_of_sinks_take_little_memory():
    run = subprocess.run([sys.executable, "-c", ROWS_PROGRAM], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 256


SHARDED_PROGRAM = """
import sys
import torch
from hivtp_hf.pruning.attention_scores import attention_of_rows, received_attention

rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 10, 8)
whole = received_attention(query, key, 0.3, 4)
part = slice(2 * rank, 2 * rank + 2)
sharded = received_attention(query[:, part], key[:, part], 0.3, 4)
torch.testing.assert_close(sharded, whole, atol=1e-6, rtol=0)
rows, weights = torch.tensor([[3, 5], [0, 9]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
of_rows = attention_of_rows(query[:, part], key[:, part], 0.3, 4, rows, weights)
torch.testing.assert_close(of_rows, attention_of_rows(query, key, 0.3, 4, rows, weights), atol=1e-6, rtol=0)
gathered = [torch.empty_like(sharded) for _ in range(2)]
torch.distributed.all_gather(gathered, sharded)
assert torch.equal(*gathered)
torch.distributed.destroy_process_group()
"""


def test_heads_sharded_over_ranks_are_averaged_over_all(free_port, tmp_path):
    programs = [["-c", SHARDED_PROGRAM, str(rank), str(free_port)] for rank in range(2)]
    ranks = run_together(programs, tmp_path, os.environ)
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]


def test_missing_heads_without_ranks_are_an_error():
    with pytest.raises(ValueError, match="2 of its 4 heads on 1 ranks"):
        received_attention(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0.3, 4)


def test_an_encoder_that_is_not_recognised_is_refused():
    with pytest.raises(ValueError, match="no stack of 7 encoder layers"):
        attach(tower_of(), 7)
