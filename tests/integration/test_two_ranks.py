"""Training on two ranks: gradients averaged over them, and weights sharded among them, equal training on one."""

import datetime
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tiny_models import LOW_RATIO, photo, twins

TEXT_ONLY, WITH_IMAGE = "USER: Is there a dog? ASSISTANT: No.", "USER: <image>\nWhat is shown? ASSISTANT: a cat on a table"
# What the two ranks read, step by step. Ranks of a sharded model meet at every layer, so that all need an image, as in stock.
STEPS = {
    "averaged": [(WITH_IMAGE, TEXT_ONLY), (TEXT_ONLY, WITH_IMAGE), (WITH_IMAGE, WITH_IMAGE)],
    "sharded": [(WITH_IMAGE, WITH_IMAGE)] * 2,
    # Each rank keeps and weighs tokens of images of its own.
    "averaged, with weights": [(WITH_IMAGE, TEXT_ONLY), (WITH_IMAGE, WITH_IMAGE)],
    "sharded, with weights": [(WITH_IMAGE, WITH_IMAGE)] * 2,
}
WEIGHTS_AND_POSITIONS = {"token_weights": "cluster_size", "positions": "original"}


def new_pair(way):
    told = WEIGHTS_AND_POSITIONS if "with weights" in way else {}
    return twins({**LOW_RATIO, "importance_start_layer": 0, **told}, vision_layers=4)


def inputs_of(pair, text, seed):
    images = photo(60, 100, seed) if "<image>" in text else None
    inputs = pair.processor(images=images, text=text, return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"]}


def losses(model, pair, steps, ranks):
    """The losses of these ranks at every step; an optimiser step follows each, so that gradients show in the next."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    of_steps = []
    for step, texts in enumerate(steps):
        of_ranks = [model(**inputs_of(pair, texts[rank], seed=10 * step + rank)).loss for rank in ranks]
        torch.stack(of_ranks).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        of_steps.append([loss.item() for loss in of_ranks])
    return of_steps


def of_one_rank(rank, port):
    torch.set_num_threads(1)
    address, timeout = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    try:
        return {way: losses_on_two_ranks(way, rank) for way in STEPS}
    finally:
        torch.distributed.destroy_process_group()


def losses_on_two_ranks(way, rank):
    pair = new_pair(way)
    if way.startswith("averaged"):
        # Where a rank has no image, its tower gets no gradient.
        return losses(DistributedDataParallel(pair.pruned, find_unused_parameters=True), pair, STEPS[way], [rank])
    for layer in (*pair.pruned.model.vision_tower.encoder.layers, *pair.pruned.model.language_model.layers):
        fully_shard(layer)
    return losses(fully_shard(pair.pruned), pair, STEPS[way], [rank])


def test_losses_are_those_of_one_rank(free_port):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        other = process.submit(of_one_rank, 1, free_port)
        of_ranks = [of_one_rank(0, free_port), other.result()]
    for way, steps in STEPS.items():
        pair = new_pair(way)
        for step, expected in enumerate(losses(pair.pruned, pair, steps, [0, 1])):
            got = [loss for of_rank in of_ranks for loss in of_rank[way][step]]
            assert got == pytest.approx(expected, rel=1e-4), f"{way}, step {step}"
