"""The reference of token weights and original positions: plain loops, and a stock model under a dense additive mask.

It shares with the pruned model the choice of tokens alone. What enters the language model, where it stands and what it weighs
is worked out anew, one token after another, and every step of a generation computes the whole sequence again.
"""

import copy

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutput

from tiny_models import IMAGE_TOKEN, image_inputs


def plain_cluster_sizes(features, kept):
    """How many cells each kept one stands for: plain NumPy, one cell at a time."""
    features = np.asarray(features, dtype=np.float32)
    norms = np.maximum(np.linalg.norm(features, axis=1), 1e-12)
    sizes = np.ones(len(kept))
    for cell in set(range(len(features))) - set(kept.tolist()):
        cosines = [features[cell] @ features[other] / norms[cell] / norms[other] for other in kept]
        sizes[int(np.argmax(cosines))] += 1
    return sizes


class Placed:
    """The rows of a batch, as the language model is to see them.

    Args:
        pair: a stock model and its pruned twin, whose settings count.
        inputs: of the processor.
    """

    def __init__(self, pair, inputs):
        self.stock, self.pruning = pair.stock, pair.pruned.config.pruning_config
        with torch.no_grad():
            self.features, self.kept, self.log_weights, self.lost = [], [], [], []
            self.first_images = [0] * len(inputs["input_ids"])
            if inputs.get("pixel_values") is not None:
                self._see(pair, inputs)

    def _see(self, pair, inputs):
        images = image_inputs(inputs)
        ratio = {"retention_ratio": inputs["retention_ratio"]} if "retention_ratio" in inputs else {}
        kept_indices = pair.pruned.get_image_features(**images, **ratio).kept_indices
        stock = pair.stock.get_image_features(**images).pooler_output
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [(56, 56)] * len(stock)
        ratios = inputs["retention_ratio"].view(torch.float64).tolist() if ratio else [None] * len(stock)
        for packed, kept, size, own in zip(stock, kept_indices, sizes, ratios, strict=True):
            pruning = self.pruning if own is None else self.pruning.replace(retention_ratio=own)
            layout = pair.pruned.model.token_layout(*size, pruning)
            cells = {position: number for number, position in enumerate(layout.cell_positions.tolist())}
            weights = np.ones(len(kept))
            is_cell = np.array([position in cells for position in kept.tolist()], dtype=bool)
            if pruning.token_weights == "cluster_size":
                of_kept = np.array([cells[position] for position in kept.tolist() if position in cells], dtype=int)
                weights[is_cell] = plain_cluster_sizes(packed[list(cells)].numpy(), of_kept)
            elif pruning.token_weights == "inclusion":
                weights[is_cell] = 1 / layout.pruning.retention_ratio
            self.features.append(packed[kept])
            self.kept.append(kept.tolist())
            self.log_weights.append(pruning.weight_strength * np.log(weights))
            self.lost.append(len(packed) - len(kept))
        placeholders, image = (inputs["input_ids"] == IMAGE_TOKEN).sum(1).tolist(), 0
        for row, number in enumerate(placeholders):
            self.first_images[row] = image
            while number > 0:
                number -= len(self.kept[image])
                image += 1

    def rows(self, input_ids, attention_mask=None):
        """Embeddings, positions and log weights of every column, one token after another."""
        words = self.stock.get_input_embeddings()
        embeddings, positions, weights = words(input_ids).clone(), torch.zeros_like(input_ids), torch.zeros(input_ids.shape)
        times = len(input_ids) // len(self.first_images)
        for row, ids in enumerate(input_ids.tolist()):
            image, token, shift, packed = self.first_images[row // times], 0, 0, 0
            for column, token_id in enumerate(ids):
                if attention_mask is not None and not attention_mask[row, column]:
                    continue
                step = shift
                if token_id == IMAGE_TOKEN:
                    embeddings[row, column] = self.features[image][token]
                    weights[row, column] = self.log_weights[image][token]
                    step = shift + self.kept[image][token] - token
                    token += 1
                    if token == len(self.kept[image]):
                        shift, image, token = shift + self.lost[image], image + 1, 0
                positions[row, column] = packed + (step if self.pruning.positions == "original" else 0)
                packed += 1
        return embeddings, positions, weights

    def logits(self, input_ids, attention_mask=None):
        """Of the whole sequence, (batch, sequence, vocabulary), by stock's own layers."""
        embeddings, positions, weights = self.rows(input_ids, attention_mask)
        length = input_ids.shape[1]
        lowest = torch.finfo(torch.float32).min
        mask = torch.where(torch.ones(length, length).tril().bool(), weights[:, None, None], lowest)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, lowest)
        states = self.stock.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        )
        return self.stock.lm_head(states.last_hidden_state)

    def model(self):
        """A model for `generate(..., use_cache=False)`: every step computes everything again."""

        def forward(model, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
            return CausalLMOutput(logits=self.logits(input_ids, attention_mask)[:, -logits_to_keep:])

        model = copy.copy(self.stock)
        model.__class__ = type("Reference", (type(self.stock),), {"forward": forward})
        return model
