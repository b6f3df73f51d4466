"""Names of weights in checkpoints: ours are stock's, in every layout that transformers has written."""

import functools

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming


@functools.cache
def take_stock_keys(model_type: str, stock_type: str) -> None:
    """Lets checkpoints of `model_type` rename their keys as those of the stock `stock_type`.

    transformers renames by model type and class, and knows only its own. Ours takes stock's rules, preceded by two: one carries
    the Hub's vision keys into the base model as well, one says of the language model what some releases say of stock's class.
    """
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightRenaming(r"^vision_tower\.vision_model\.", "model.vision_tower."),
            WeightRenaming(r"^language_model\.model\.", "model.language_model."),
            *(get_checkpoint_conversion_mapping(stock_type) or []),
        ],
        overwrite=True,
    )
