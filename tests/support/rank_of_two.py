"""One of two ranks that share a model by transformers' tensor parallelism: python rank_of_two.py RANK PORT FOLDER PLAN

PLAN is JSON: "auto", or a tensor parallel plan. Prints what this rank saw and answered, as JSON.
"""

import dataclasses
import json
import os
import sys

import torch
from transformers.distributed import DistributedConfig

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor
from hivtp_hf.pruning import attention_interface as received_attention
from tiny_models import greedy, image_inputs, photo


def main(rank: str, port: str, folder: str, plan: str) -> None:
    # transformers takes the device of a rank from here.
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo")
    model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(folder, **_sharded(json.loads(plan))).eval()
    heads, reduce = set(), received_attention.received_attention

    def watched(query, *arguments):
        heads.add(query.shape[1])
        return reduce(query, *arguments)

    received_attention.received_attention = watched
    print(json.dumps({**answers(model, folder), "heads": sorted(heads)}))
    torch.distributed.destroy_process_group()


def _sharded(plan) -> dict:
    if any(field.name == "tp_plan" for field in dataclasses.fields(DistributedConfig)):
        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    return {"tp_plan": plan}


@torch.no_grad()
def answers(model, folder) -> dict:
    """What a model keeps of two images, and what it generates."""
    processor = HIVTPLlavaNextProcessor.from_pretrained(folder)
    images = [photo(60, 100), photo(100, 60, seed=1)]
    prompts = ["USER: <image>\nWhat is shown? ASSISTANT:", "USER: <image>\nHow many people? ASSISTANT:"]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    kept = model.get_image_features(**image_inputs(inputs)).kept_indices
    return {"kept": [indices.tolist() for indices in kept], "generated": greedy(model, inputs).tolist()}


if __name__ == "__main__":
    main(*sys.argv[1:])
