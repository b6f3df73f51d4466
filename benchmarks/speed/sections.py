"""Which part of a run takes the time: a stopwatch at the seams of the models, while they run as they are."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hivtp_hf.pruning.attention_interface
import hivtp_hf.pruning.features

from . import published_way
from .models import Models
from .stopwatch import Stopwatch

VISION, TOWER, SCORING, SELECTION, LANGUAGE_MODEL = "vision pass", "tower", "scoring", "selection", "language model"
WEIGHING = "weighing"


@contextlib.contextmanager
def watched(models: Models, stopwatch: Stopwatch) -> Iterator[None]:
    """Times sections of all models' runs.

    * `VISION`: stock's or our `get_image_features` (tower, projector, packing; with us, scoring and selection too).
    * `TOWER`: the encoder, with the scoring that happens inside it.
    * `SCORING`: from queries and keys of the scored layers, or from maps, to a score per token.
    * `SELECTION`: from scores and features to the features that are kept, and to what they weigh.
    * `WEIGHING`: in it, from features to token weights, where there are any.
    * `LANGUAGE_MODEL`: its layers, without the head.
    """
    timing = stopwatch.timing
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, attribute: str, name: str) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, timing(name, getattr(owner, attribute))))

        for model in (models.stock, models.pruned, models.published):
            replace(model.model, "get_image_features", VISION)
            replace(model.model.vision_tower, "forward", TOWER)
            replace(model.model.language_model, "forward", LANGUAGE_MODEL)
        replace(hivtp_hf.pruning.attention_interface, "received_attention", SCORING)
        replace(models.pruned.model, "_prune", SELECTION)
        replace(hivtp_hf.pruning.features, "log_weights", WEIGHING)
        replace(published_way, "scores_from_maps", SCORING)
        replace(published_way, "select_from_scores", SELECTION)
        yield
