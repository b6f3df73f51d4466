"""The oracle of the behaviour tests: a stock model that is given the pruned sequence.

Its own features, indexed by the pruned model's `kept_indices`, stand in its own embeddings of the pruned prompt. So it
shares with the pruned model the choice of tokens alone, and the averages of methods that make some. Other tests hold both
against the method.
"""

import torch

from kept_rows import kept_rows
from tiny_models import Twins, image_inputs


def oracle_inputs(pair: Twins, inputs, **feature_arguments) -> dict:
    """What a stock model is given in place of a pruned processor's `inputs`: embeddings and the attention mask.

    Args:
        pair: the models.
        inputs: as the pruned processor returns them.
        **feature_arguments: for `get_image_features`, such as `vision_feature_layer`.
    """
    with torch.no_grad():
        embeddings = pair.stock.get_input_embeddings()(inputs["input_ids"])
        if inputs.get("pixel_values") is not None:
            images = image_inputs(inputs)
            ratio = {"retention_ratio": inputs["retention_ratio"]} if "retention_ratio" in inputs else {}
            output = pair.pruned.get_image_features(**images, **ratio, **feature_arguments)
            packed = pair.stock.get_image_features(**images, **feature_arguments).pooler_output
            features = torch.cat(kept_rows(packed, output.pooler_output, output))
            placeholders = (inputs["input_ids"] == pair.stock.config.image_token_id)[..., None]
            # Under autocast the projector's output has another dtype than the embeddings.
            embeddings = embeddings.masked_scatter(placeholders, features.to(embeddings.dtype))
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
