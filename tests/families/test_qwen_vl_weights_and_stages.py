"""Qwen-VL under `token_weights` and `stages`: against a plain loop over stock's layers, row by row."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from flash_stand_in import FLASH
from hivtp_hf.pruning.compat import cache_argument, cache_of, prefills_images_in_chunks
from nightly import mostly_nightly
from places_reference import plain_cluster_sizes, states_in_stages
from tiny_qwen import IMAGE, OURS, TEXT_TOKENS, inputs_of, oracle, prompt_of, qwen_twins

STAGES = {"retention_ratio": 0.6, "stages": [[1, 0.5], [2, 0.6]]}
TOLD = {
    "stages": STAGES,
    "weights": {"retention_ratio": 0.4, "token_weights": "cluster_size"},
    "both": {**STAGES, "token_weights": "cluster_size", "weight_strength": 0.7},
}
ONE = [[5, (8, 12), 7]]
BATCH = [[5, (8, 12), 7], [3, (4, 4), 2, (20, 6), 9], [4]]


@pytest.fixture(scope="module", params=mostly_nightly(OURS, lambda family: family != "qwen2_vl"))
def pair(request):
    return qwen_twins(request.param)


@pytest.fixture(params=mostly_nightly(TOLD, lambda told: told == "both"), autouse=True)
def told(request, pair):
    pair.pruned.config.pruning_config = TOLD[request.param]
    return request.param


class Reference:
    """What the language model is to see of some rows, and its logits, everything anew at every step."""

    def __init__(self, pair, stock_inputs, inputs):
        self.stock, self.pruning = pair.stock, pair.pruned.config.pruning_config
        self.given = oracle(pair, stock_inputs, inputs)
        self.is_image = inputs["input_ids"] == IMAGE
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        with torch.no_grad():
            kept = pair.pruned.get_image_features(**images).kept_indices
            features = pair.stock.model.get_image_features(**images, return_dict=True).pooler_output
        look = pair.pruned.look(images)
        importance = look.importance().split([len(of_image) for of_image in features])
        weights, survived = [], []
        for of_image, indices, scores in zip(features, kept, importance, strict=True):
            sizes = np.ones(len(indices))
            if self.pruning.token_weights == "cluster_size":
                sizes = plain_cluster_sizes(of_image.numpy(), indices.numpy())
            weights += (self.pruning.weight_strength * np.log(sizes)).tolist()
            left = sorted(range(len(indices)), key=lambda token, s=scores, i=indices: (-float(s[i[token]]), token))
            stages = [math.inf] * len(indices)
            for stage, (_, ratio) in enumerate(self.pruning.stages):
                stays = len(left) - round(len(left) * (1 - ratio))
                for token in left[stays:]:
                    stages[token] = stage
                left = left[:stays]
            survived += stages
        self.weights, self.survived = torch.zeros(self.is_image.shape), torch.full(self.is_image.shape, math.inf)
        self.weights[self.is_image], self.survived[self.is_image] = torch.tensor(weights), torch.tensor(survived)

    def logits(self):
        deepstack = self.given.get("deepstack_visual_embeds", [])
        mask, positions = self.given["attention_mask"], self.given["position_ids"]
        logits = torch.zeros(*mask.shape, self.stock.lm_head.out_features)
        first = 0
        for row in range(len(mask)):
            columns, is_image = mask[row].nonzero()[:, 0], self.is_image[row]
            number = (is_image.cumsum(0) - 1 + first)[columns]
            visual = is_image[columns]

            def with_deepstack(layer, states, left, number=number, visual=visual):
                if layer < len(deepstack):
                    states = states.clone()
                    states[visual[left]] += deepstack[layer][number[left][visual[left]]]
                return states

            states = states_in_stages(
                self.stock.model.language_model,
                self.given["inputs_embeds"][row, columns],
                positions[:, row, columns],
                self.weights[row, columns],
                self.survived[row, columns],
                [layer for layer, _ in self.pruning.stages],
                with_deepstack,
            )
            logits[row, columns] = self.stock.lm_head(states)
            first += int(is_image.sum())
        return logits

    @torch.no_grad()
    def greedy(self, number):
        answers = [[] for _ in self.weights]
        for _ in range(number):
            new = self.logits()[:, -1, :TEXT_TOKENS].argmax(-1)
            for answer, token in zip(answers, new.tolist(), strict=True):
                answer.append(token)
            embedded = self.stock.model.get_input_embeddings()(new)[:, None]
            self.given["inputs_embeds"] = torch.cat((self.given["inputs_embeds"], embedded), dim=1)
            self.given["position_ids"] = torch.cat(
                (self.given["position_ids"], self.given["position_ids"][..., -1:] + 1), dim=2
            )
            self.given["attention_mask"] = torch.nn.functional.pad(self.given["attention_mask"], (0, 1), value=1)
            self.is_image = torch.nn.functional.pad(self.is_image, (0, 1))
            self.weights = torch.nn.functional.pad(self.weights, (0, 1))
            self.survived = torch.nn.functional.pad(self.survived, (0, 1), value=math.inf)
        return answers


def greedy(pair, inputs, number=4, **options):
    with torch.compiler.set_stance("force_eager"):
        generated = pair.pruned.generate(**inputs, max_new_tokens=number, do_sample=False, **options)
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss_equal_the_reference(pair, side):
    stock, pruned = inputs_of(pair, BATCH, side)
    seen = pruned["attention_mask"].bool()
    labels = pruned["input_ids"].masked_fill(~seen | (pruned["input_ids"] == IMAGE), -100)
    with torch.no_grad():
        got, expected = pair.pruned(**pruned, labels=labels), Reference(pair, stock, pruned).logits()
    torch.testing.assert_close(got.logits[seen], expected[seen], atol=2e-4, rtol=1e-4)
    if side == "left":  # a label right behind padding is predicted by padding, which shows nothing that means anything
        labels = labels.masked_fill(torch.nn.functional.pad(seen, (1, 0))[:, :-1] == 0, -100)
        got = pair.pruned(**pruned, labels=labels)
    shifted = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got.loss, shifted, atol=1e-4, rtol=0)


WAYS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "look-up": {"prompt_lookup_num_tokens": 2},
    "chunks": {"prefill_chunk_size": 9},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
def test_answers_equal_the_reference(pair, implementation):
    pair = pair._replace(pruned=copy.deepcopy(pair.pruned))
    pair.pruned.set_attn_implementation({"text_config": implementation})
    stock, pruned = inputs_of(pair, BATCH)
    assert greedy(pair, pruned) == Reference(pair, stock, pruned).greedy(4)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(pair, way):
    stock, pruned = inputs_of(pair, ONE if way == "look-up" else BATCH)
    if way == "chunks" and not prefills_images_in_chunks():
        pytest.skip("this release drops images from a prefill in chunks")
    assert greedy(pair, pruned, **WAYS[way]) == Reference(pair, stock, pruned).greedy(4)


def test_an_assistant_and_beams(pair):
    _, pruned = inputs_of(pair, ONE)
    assert greedy(pair, pruned, assistant_model=copy.deepcopy(pair.pruned)) == greedy(pair, pruned)
    assert greedy(pair, pruned, num_beams=3) == greedy(pair, pruned, num_beams=3, use_cache=False)


@pytest.mark.parametrize("grid", [None, (12, 4)], ids=["text", "a new image"])
def test_a_second_turn_on_a_kept_cache(pair, grid):
    _, first = inputs_of(pair, ONE)
    begun = pair.pruned.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = [[4]] if grid is None else [[2, grid, 4]]
    _, second = inputs_of(pair, more) if grid else (None, prompt_of(more))
    ids = torch.cat((begun.sequences, second["input_ids"]), dim=1)
    turns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long()}
    images = {name: second[name] for name in ("pixel_values", "image_grid_thw") if name in second}
    cache = {cache_argument(type(pair.pruned).forward): cache_of(begun)}
    went_on = pair.pruned.generate(**turns, **images, **cache, max_new_tokens=4, do_sample=False)
    images = {
        name: torch.cat((first[name], *([images[name]] if images else []))) for name in ("pixel_values", "image_grid_thw")
    }
    assert torch.equal(went_on, pair.pruned.generate(**turns, **images, max_new_tokens=4, do_sample=False))


def test_threads_and_copies_keep_apart(pair):
    prompts = [inputs_of(pair, rows)[1] for rows in (ONE, BATCH)]
    expected = [greedy(pair, inputs) for inputs in prompts]
    copied, found = copy.deepcopy(pair.pruned), {}

    def run(number):
        found[number] = pair.pruned.generate(**prompts[number], max_new_tokens=4, do_sample=False)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        length = prompts[number]["input_ids"].shape[1]
        assert found[number][:, length:].tolist() == expected[number]
        assert greedy(pair._replace(pruned=copied), prompts[number]) == expected[number]


def test_an_adapter_has_the_references_gradients(pair):
    stock_inputs, pruned = inputs_of(pair, BATCH, "right")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False)
    found = []
    for model in (copy.deepcopy(pair.pruned), copy.deepcopy(pair.stock)):
        torch.manual_seed(3)
        found.append(get_peft_model(model, lora).train())
    ours, stock = found
    labels = pruned["input_ids"].masked_fill((pruned["attention_mask"] == 0) | (pruned["input_ids"] == IMAGE), -100)
    ours(**pruned, labels=labels, use_cache=False).loss.backward()
    logits = Reference(pair._replace(stock=stock.base_model.model), stock_inputs, pruned).logits()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    of_stock = {name: parameter.grad for name, parameter in stock.named_parameters()}
    trained = [
        (name, parameter) for name, parameter in ours.named_parameters() if parameter.requires_grad and "language_model" in name
    ]
    assert len(trained) >= 12
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, of_stock[name], atol=2e-4, rtol=1e-2)


def test_a_ratio_of_1_everywhere_is_stock_bit_for_bit(pair):
    settings = pair.pruned.config.pruning_config
    pair.pruned.config.pruning_config = settings.replace(retention_ratio=1, stages=[[layer, 1] for layer, _ in settings.stages])
    stock, pruned = inputs_of(pair, BATCH)
    with torch.no_grad():
        assert torch.equal(pair.pruned(**pruned).logits, pair.stock(**stock).logits)
    assert greedy(pair, pruned) == greedy(pair._replace(pruned=pair.stock), stock)
