"""What retention in stages costs and saves: time to the first token beside what no choice of tokens can beat.

Run by `python -m benchmarks.stages`; about half an hour on two cores. Random weights of real shapes: LLaVA-NeXT's CLIP tower
and four layers of Vicuna-7B. Nothing is downloaded.

* ours: a method of one stage, the same with a stage before layer 2, and VFlowOpt with its three stages.
* limit: stock's vision pass, then stock's layers on as many tokens as each of them sees under ours, simply the first ones.
  Nothing is scored, ranked or gathered.

Times are of the processor, as they are what a neighbour on the same cores changes least. All variants run in turn.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from hivtp_hf.pruning.compat import cache_argument, cache_of
from hivtp_hf.pruning.settings import VisualTokenPruningConfig
from hivtp_hf.pruning.staged_language_model import layers_of
from hivtp_hf.pruning.stages import stages_of_language_model, tokens_of_layers

from .speed.images import TEXT_TOKENS, Images, prompt_ids, random_images
from .speed.interleaving import interleave
from .speed.models import Models, build_models
from .speed.presets import PRESETS

_LAYERS = 4
_IMAGE = (480, 640)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "hivtp 1/2": {"method": "hivtp", "retention_ratio": 0.5},
    "hivtp 1/2, half of it from layer 2": {"method": "hivtp", "retention_ratio": 0.5, "stages": [[2, 0.5]]},
    "hivtp 3/8": {"method": "hivtp", "retention_ratio": 0.375},
    "vflowopt 1/2": {"method": "vflowopt", "retention_ratio": 0.5},
    "vflowopt 1/4": {"method": "vflowopt", "retention_ratio": 0.25},
}


def _ours(models: Models, images: Images, settings: Mapping[str, Any]) -> Any:
    models.pruned.config.pruning_config = settings
    layout = models.pruned.model.token_layout(*_IMAGE)
    ids = prompt_ids(models.config, layout.num_retained, images.batch, models.device)
    output = models.pruned(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=images.pixel_values,
        image_sizes=images.image_sizes,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].argmax(-1).tolist(), cache_of(output)


def _limit(models: Models, images: Images, tokens: list[int], starts: list[int]) -> Any:
    """Stock's features, of which every segment of stock's layers sees the first ones, and the text."""
    stock = models.stock
    ids = prompt_ids(models.config, tokens[0], images.batch, models.device)
    (features,) = stock.get_image_features(images.pixel_values, images.image_sizes).pooler_output
    embeddings = stock.get_input_embeddings()(ids)
    is_image = (ids == models.config.image_token_id)[..., None]
    states = embeddings.masked_scatter(is_image, features[: tokens[0]])
    language_model, name = stock.model.language_model, cache_argument(type(stock.model.language_model).forward)
    caches = []
    bounds = [0, *starts, len(language_model.layers)]
    for first, behind in itertools.pairwise(bounds):
        # Text stands behind the image for the most part; which tokens go makes no difference to time.
        states = states[:, -(tokens[first] + TEXT_TOKENS) :]
        cache = transformers.DynamicCache()
        layers = layers_of(language_model, first, behind)
        states = layers(inputs_embeds=states, **{name: cache}, use_cache=True).last_hidden_state
        caches.append(cache)
    return stock.lm_head(states[:, -1:])[:, -1].argmax(-1).tolist(), caches


@torch.inference_mode()
def rows(rounds: int) -> list[str]:
    """A line of a table for every variant: tokens by layer, seconds, and the ratio to the limit of each round."""
    preset = PRESETS["cpu"]
    config = preset.config()
    config.text_config.num_hidden_layers = _LAYERS
    models = build_models(config, torch.device("cpu"), torch.float32)
    images = random_images(models.config, _IMAGE, 1, models.device, models.dtype)
    runs, tokens = {}, {}
    for name, settings in VARIANTS.items():
        pruning = VisualTokenPruningConfig(**settings)
        layout = models.pruned.model.token_layout(*_IMAGE, pruning)
        tokens[name] = tokens_of_layers(layout, _LAYERS)
        starts = [layer for layer, _ in stages_of_language_model(pruning, _LAYERS)]
        runs["ours", name] = functools.partial(_timed, functools.partial(_ours, models, images, settings))
        runs["limit", name] = functools.partial(_timed, functools.partial(_limit, models, images, tokens[name], starts))
    seconds = interleave(runs, rounds, list(runs))
    lines = ["| | tokens of the layers | ours, s | over the limit |", "|---|---|---|---|"]
    for name in VARIANTS:
        ours, limit = seconds["ours", name], seconds["limit", name]
        ratios = [mine / least for mine, least in zip(ours, limit, strict=True)]
        lines.append(
            f"| {name} | {', '.join(map(str, tokens[name]))} | {statistics.median(ours):.2f} | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return lines


def _timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of every variant")
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, float32")
    print("\n".join(rows(rounds)))


if __name__ == "__main__":
    main()
