"""`exact_count=False`: placeholders without a token have no effect, held against stock on the truly shorter embeddings."""

import copy

import pytest
import torch
from transformers import DynamicCache

from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig, select_hivtp
from hivtp_hf.pruning.compat import cache_of, prefills_images_in_chunks
from hivtp_hf.pruning.surplus_placeholders import move_labels, surplus_of_images
from tiny_models import CACHE, CACHE_NAMES, COMMON, TOWERS, image_inputs, photo, twins

# On tiles of 8 x 8 cells this leaves up to 14 placeholders of an image without a token.
PUBLISHED = {"global_ratio": 0.6, "exact_count": False}
IMAGE = 3
PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@pytest.fixture(scope="module", params=["LLaVA-NeXT, CLIP", "LLaVA-1.5, CLIP", "LLaVA-1.5, CLIP, full"])
def pair(request):
    return twins(PUBLISHED, **TOWERS[request.param])


def prepare(pair, text, sizes, **options):
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    return pair.processor(images=images or None, text=text, return_tensors="pt", padding=True, **options)


def short_embeddings(pair, inputs, labels=None):
    """Of every row what stock gets: embeddings without surplus and padding, (1, length, hidden), and labels alike."""
    with torch.no_grad():
        kept, features, written = [], [], []
        if "pixel_values" in inputs:
            pruned = pair.pruned.model.get_image_features(**image_inputs(inputs))
            kept, written = pruned.kept_indices, [len(of_image) for of_image in pruned.pooler_output]
            features = pair.stock.model.get_image_features(**image_inputs(inputs)).pooler_output
        embeddings = pair.stock.get_input_embeddings()(inputs["input_ids"])
    surplus_total, rows, image = 0, [], 0
    for row, ids in enumerate(inputs["input_ids"]):
        keep = inputs["attention_mask"][row].bool()
        places = (ids == IMAGE).nonzero().flatten()
        while len(places):
            surplus = written[image] - len(kept[image])
            surplus_total += surplus
            keep[places[:surplus]] = False
            embeddings[row, places[surplus : written[image]]] = features[image][kept[image]]
            places, image = places[written[image] :], image + 1
        short_labels = None if labels is None else labels[row][keep][None]
        rows.append((embeddings[row][keep][None], short_labels))
    assert "pixel_values" not in inputs or surplus_total > 0
    return rows


def layout_of(pair, size):
    return pair.processor.token_layout(*size)


def new_tokens(model, inputs, **options):
    output = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, suppress_tokens=[IMAGE], **options)
    return output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output


def stock_tokens(pair, inputs, **options):
    rows = short_embeddings(pair, inputs)
    return torch.cat([new_tokens(pair.stock, {"inputs_embeds": embeddings}, **options) for embeddings, _ in rows])


def test_features_are_zeros_then_the_published_choice(pair):
    sizes = [(60, 100), (112, 112)]
    inputs = prepare(pair, [PROMPT, PROMPT], sizes)
    with torch.no_grad():
        output = pair.pruned.model.get_image_features(**image_inputs(inputs))
        stock = pair.stock.model.get_image_features(**image_inputs(inputs))
    all_surplus = []
    for size, features, kept, packed in zip(sizes, output.pooler_output, output.kept_indices, stock.pooler_output, strict=True):
        surplus = layout_of(pair, size).num_retained - len(kept)
        all_surplus.append(surplus)
        assert len(features) == layout_of(pair, size).num_retained
        assert not features[:surplus].any()
        assert torch.equal(features[surplus:], packed[kept])
    assert max(all_surplus) > 0


BATCHES = {
    "one": ([PROMPT], [(60, 100)]),
    "image last": (["USER: What is shown? <image>"], [(60, 100)]),
    "mixed sizes": (["USER: <image>\nHi ASSISTANT:", "<image> a longer text than the other"], [(60, 100), (112, 112)]),
    "several in a row": (["<image> and <image> x", "no image", "<image>"], [(60, 100), (200, 50), (112, 112)]),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_forward_equals_stock_on_shorter_embeddings(pair, batch):
    inputs = prepare(pair, *BATCHES[batch])
    with torch.no_grad():
        logits = pair.pruned(**inputs).logits
        for row, (embeddings, _) in enumerate(short_embeddings(pair, inputs)):
            expected = pair.stock(inputs_embeds=embeddings).logits[0]
            keep = short_row_mask(pair, inputs, row)
            is_text = inputs.input_ids[row] != IMAGE
            torch.testing.assert_close(logits[row, keep & is_text], expected[is_text[keep]], atol=1e-4, rtol=0)
            torch.testing.assert_close(logits[row, -1], expected[-1], atol=1e-4, rtol=0)


def short_row_mask(pair, inputs, row):
    """Positions of a row that are neither padding nor surplus."""
    with torch.no_grad():
        output = pair.pruned.model.get_image_features(**image_inputs(inputs))
    surplus = surplus_of_images(
        inputs.input_ids == IMAGE, [len(f) for f in output.pooler_output], [len(k) for k in output.kept_indices]
    )
    return inputs.attention_mask[row].bool() & ~surplus[row]


SETTINGS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch", BATCHES)
def test_generate_equals_stock_on_shorter_embeddings(pair, batch, setting):
    inputs = prepare(pair, *BATCHES[batch])
    options = SETTINGS[setting]
    assert torch.equal(new_tokens(pair.pruned, inputs, **options), stock_tokens(pair, inputs, **options))


def test_assistants_look_up_and_chunks(pair):
    inputs = prepare(pair, *BATCHES["one"])
    expected = stock_tokens(pair, inputs, do_sample=False)
    # Copies, as transformers writes the state of its schedule into the assistant's configuration.
    settings = [{"assistant_model": copy.deepcopy(model)} for model in (pair.pruned, pair.stock)]
    settings.append({"prompt_lookup_num_tokens": 3})
    if prefills_images_in_chunks():  # else it is an error, see test_generation
        settings.append({"prefill_chunk_size": 16})
    for options in settings:
        assert torch.equal(new_tokens(pair.pruned, inputs, do_sample=False, **options), expected)


def test_sampling_with_several_returns(pair):
    inputs = prepare(pair, *BATCHES["one"])
    results = []
    for model, given in ((pair.pruned, inputs), (pair.stock, {"inputs_embeds": short_embeddings(pair, inputs)[0][0]})):
        torch.manual_seed(0)
        results.append(new_tokens(model, given, do_sample=True, num_return_sequences=3))
    assert torch.equal(*results)
    assert len(results[0].unique(dim=0)) > 1


def test_a_missing_attention_mask_is_inferred(pair):
    inputs = prepare(pair, *BATCHES["mixed sizes"])
    expected = new_tokens(pair.pruned, inputs, do_sample=False)
    del inputs["attention_mask"]
    assert torch.equal(new_tokens(pair.pruned, inputs, do_sample=False), expected)


def decode_by_hand(pair, inputs, number, cache_name, with_mask=True, cache=None):
    """Greedy tokens of a loop that goes on from each returned cache, or from a cache that is given and filled."""
    mask, tokens, given = inputs["attention_mask"], [], dict(inputs)
    for _ in range(number):
        given["attention_mask"] = mask if with_mask else None
        with torch.no_grad():
            output = pair.pruned(**given, **{cache_name: cache}, use_cache=True)
        cache, logits = cache_of(output), output.logits[0, -1]
        logits[IMAGE] = -torch.inf
        logits[pair.stock.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        tokens.append(int(logits.argmax()))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        given = {"input_ids": torch.tensor([[tokens[-1]]])}
    return tokens


@pytest.mark.parametrize("cache_name", CACHE_NAMES)
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("source", ["returned", "given"])
def test_a_hand_written_decoding_loop(pair, with_mask, cache_name, source):
    inputs = prepare(pair, *BATCHES["one"])
    expected = stock_tokens(pair, inputs, do_sample=False)[0].tolist()
    cache = DynamicCache() if source == "given" else None
    assert decode_by_hand(pair, inputs, len(expected), cache_name, with_mask, cache) == expected


def first_turn(pair, **options):
    """Inputs of a conversation with an image, what was answered and the cache that was returned."""
    first = prepare(pair, *BATCHES["one"])
    output = pair.pruned.generate(**first, **COMMON, return_dict_in_generate=True, **options)
    return first, output.sequences[:, first.input_ids.shape[1] :], cache_of(output)


def second_turn(pair, first, answer, text, sizes):
    """Ids of a conversation that goes on, with the images of this turn alone; and stock's embeddings of all of it."""
    more = prepare(pair, [text], sizes)
    ids = torch.cat((first.input_ids, answer, more.input_ids), dim=1)
    with torch.no_grad():
        middle = pair.stock.get_input_embeddings()(answer)
    embeddings = torch.cat([short_embeddings(pair, first)[0][0], middle, short_embeddings(pair, more)[0][0]], dim=1)
    return {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"inputs_embeds": embeddings}


SECOND_TURNS = {"text": ("USER: And now? ASSISTANT:", []), "an image": ("USER: <image> And here? ASSISTANT:", [(200, 50)])}


@pytest.mark.releases
@pytest.mark.parametrize("cache_name", CACHE_NAMES)
@pytest.mark.parametrize("turn", SECOND_TURNS)
def test_a_second_turn_on_a_kept_cache(pair, turn, cache_name):
    first, answer, cache = first_turn(pair)
    inputs, for_stock = second_turn(pair, first, answer, *SECOND_TURNS[turn])
    scores = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 1}
    (logits,) = pair.pruned.generate(**inputs, **scores, **{cache_name: copy.deepcopy(cache)}).logits
    (expected,) = pair.stock.generate(**for_stock, **scores).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(
        new_tokens(pair.pruned, inputs, do_sample=False, **{cache_name: cache}),
        new_tokens(pair.stock, for_stock, do_sample=False),
    )


def test_a_cache_that_lost_its_surplus_is_refused(pair):
    first, answer, cache = first_turn(pair, **{CACHE: DynamicCache()})
    inputs, _ = second_turn(pair, first, answer, *SECOND_TURNS["an image"])
    new_tokens(pair.pruned, inputs, do_sample=False, **{CACHE: copy.deepcopy(cache)})  # a copy keeps it
    del cache.hivtp_surplus
    with pytest.raises(ValueError, match=r"the cache holds \d+ image placeholders"):
        new_tokens(pair.pruned, inputs, do_sample=False, **{CACHE: cache})


@pytest.mark.parametrize("placeholders", ["ignored", "as they are"])
def test_the_loss_equals_stocks(pair, placeholders):
    inputs = prepare(pair, ["USER: <image>\nWhat is shown? ASSISTANT: a cat"], [(60, 100)])
    labels = inputs.input_ids.clone()
    if placeholders == "ignored":
        labels[labels == IMAGE] = -100
    loss = pair.pruned(**inputs, labels=labels).loss
    ((embeddings, short_labels),) = short_embeddings(pair, inputs, labels)
    expected = pair.stock(inputs_embeds=embeddings, labels=short_labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in pair.pruned.parameters() if p.grad is not None)
    pair.pruned.zero_grad()


def test_labels_move_past_surplus():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    surplus = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    assert move_labels(labels, surplus).tolist() == [[1, 4, -100, -100, 5, 7, -100], [2, -100, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_of_one_is_still_stock(family):
    pair = twins({"retention_ratio": 1.0, "exact_count": False}, family=family)
    inputs = prepare(pair, *BATCHES["one"])
    with torch.no_grad():
        assert torch.equal(pair.pruned(**inputs).logits, pair.stock(**inputs).logits)
    scores, valid = torch.rand(1, 8, 8), torch.rand(1, 8, 8) < 0.7
    pruning = VisualTokenPruningConfig(retention_ratio=1.0, exact_count=False)
    assert torch.equal(select_hivtp(scores, valid, pruning), valid)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_sliding_window_is_refused(family):
    pair = twins(PUBLISHED, text_type="mistral", family=family)
    inputs = prepare(pair, *BATCHES["one"])
    length = inputs.input_ids.shape[1]
    pair.pruned.config.text_config.sliding_window = length + 2
    pair.pruned(**inputs)
    assert pair.pruned.generate(**inputs, max_new_tokens=2).shape[1] <= length + 2
    with pytest.raises(ValueError, match=rf"{length + 3} positions.*sliding window {length + 2}.*exact_count=True"):
        pair.pruned.generate(**inputs, max_new_tokens=3)
    pair.pruned.config.text_config.sliding_window = length - 1
    with pytest.raises(ValueError, match="sliding window"):
        pair.pruned(**inputs)
