"""The reference of token weights, original positions and stages: plain loops, and stock layers under a dense additive mask.

It shares with the pruned model the choice of tokens alone. What enters the language model, where it stands and what it weighs
is worked out anew, one token after another, and every step of a generation computes the whole sequence again. With stages every
row runs by itself, its layers in a plain loop.
"""

import copy

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutput

from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.stages import stages_of_language_model
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
        self.in_stages = self.pruning.drops_in_stages
        with torch.no_grad():
            self.features, self.kept, self.log_weights, self.lost, self.survived = [], [], [], [], []
            self.first_images = [0] * len(inputs["input_ids"])
            if inputs.get("pixel_values") is not None:
                self._see(pair, inputs)

    def _see(self, pair, inputs):
        images = image_inputs(inputs)
        ratio = {"retention_ratio": inputs["retention_ratio"]} if "retention_ratio" in inputs else {}
        output = pair.pruned.get_image_features(**images, **ratio)
        kept_indices = output.kept_indices
        stock = pair.stock.get_image_features(**images).pooler_output
        look = pair.pruned.look(images)
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [(56, 56)] * len(stock)
        ratios = inputs["retention_ratio"].view(torch.float64).tolist() if ratio else [None] * len(stock)
        for image, (packed, kept, size, own) in enumerate(zip(stock, kept_indices, sizes, ratios, strict=True)):
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
            number = len(self.features)
            self.survived.append(self._survived(look, number, layout, kept.tolist(), cells) if self.in_stages else None)
            features = packed[kept]
            if output.is_average is not None:  # which averages these are is the method's, like the choice of tokens
                features = torch.where(output.is_average[image][:, None], output.pooler_output[image], features)
            self.features.append(features)
            self.kept.append(kept.tolist())
            self.log_weights.append(pruning.weight_strength * np.log(weights))
            self.lost.append(len(packed) - len(kept))
        placeholders, image = (inputs["input_ids"] == IMAGE_TOKEN).sum(1).tolist(), 0
        for row, number in enumerate(placeholders):
            self.first_images[row] = image
            while number > 0:
                number -= len(self.kept[image])
                image += 1

    def _survived(self, look, number, layout, kept, cells):
        """After how many stages every kept token is still there; infinity for newlines and class tokens.

        Where the method counts newlines, these are the last to go.
        """
        layouts = look.layouts()
        layouts[number] = layout
        importance = look.importance(layout.pruning, layouts).split([each.num_cells for each in layouts])[number]
        numbers = layout.cell_numbers(layout.cell_positions).tolist()
        score = {place: float(importance[numbers[cell]]) for place, cell in cells.items()}
        if METHODS[layout.pruning.method].counts_newlines:
            score = {**dict.fromkeys(kept, float("inf")), **score}
        left = sorted((place for place in kept if place in score), key=lambda place: (-score[place], place))
        survived = dict.fromkeys(kept, float("inf"))
        for stage, (_, ratio) in enumerate(self._stages(layout.pruning)):
            stays = len(left) - round(len(left) * (1 - ratio))
            survived.update(dict.fromkeys(left[stays:], stage))
            left = left[:stays]
        return [survived[place] for place in kept]

    def _stages(self, pruning):
        return stages_of_language_model(pruning, len(self.stock.model.language_model.layers))

    def rows(self, input_ids, attention_mask=None):
        """Embeddings, positions and log weights of every column, one token after another; also in `self.stages_of_columns`."""
        words = self.stock.get_input_embeddings()
        self.stages_of_columns = torch.full(input_ids.shape, torch.inf)
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
                    if self.in_stages:
                        self.stages_of_columns[row, column] = self.survived[image][token]
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
        if self.in_stages:
            return self._logits_in_stages(embeddings, positions, weights, attention_mask)
        length = input_ids.shape[1]
        lowest = torch.finfo(torch.float32).min
        mask = torch.where(torch.ones(length, length).tril().bool(), weights[:, None, None], lowest)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, lowest)
        states = self.stock.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        )
        return self.stock.lm_head(states.last_hidden_state)

    def _logits_in_stages(self, embeddings, positions, weights, attention_mask):
        mask = torch.ones(weights.shape) if attention_mask is None else attention_mask
        language_model = self.stock.model.language_model
        starts = [layer for layer, _ in self._stages(self.pruning)]
        logits = embeddings.new_zeros(*weights.shape, self.stock.lm_head.out_features)
        for row in range(len(weights)):
            columns = mask[row].nonzero()[:, 0]
            states = states_in_stages(
                language_model,
                embeddings[row, columns],
                positions[row, columns],
                weights[row, columns],
                self.stages_of_columns[row, columns],
                starts,
            )
            logits[row, columns] = self.stock.lm_head(states)
        return logits

    def model(self):
        """A model for `generate(..., use_cache=False)`: every step computes everything again."""

        def forward(model, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
            return CausalLMOutput(logits=self.logits(input_ids, attention_mask)[:, -logits_to_keep:])

        model = copy.copy(self.stock)
        model.__class__ = type("Reference", (type(self.stock),), {"forward": forward})
        return model


def states_in_stages(language_model, states, positions, weights, survived, starts, after_layer=None):
    """The last states of one sequence, (length, hidden), by a loop over stock's layers that loses columns on its way.

    A lost column shows the state of the last one before it that is left, as the released classes have it.

    Args:
        language_model: stock's.
        states: (length, hidden), what enters the first layer.
        positions: int64 (length,), or (3, length) where a token has a place in time, height and width.
        weights: float (length,), added to the logits of the columns' keys.
        survived: float (length,), after how many stages a column is still there.
        starts: the layers before which a stage is.
        after_layer: called with the layer, its output (left, hidden) and the columns left; returns what goes on.
    """
    lowest, length = torch.finfo(states.dtype).min, len(states)
    left = torch.arange(length)
    for number, layer in enumerate(language_model.layers):
        if number in starts:
            stays = survived[left] > starts.index(number)
            states, left = states[stays], left[stays]
        mask = torch.where(torch.ones(len(left), len(left)).tril().bool(), weights[left], lowest)
        places = positions[..., left]
        rotary = language_model.rotary_emb(states[None], places[:, None] if places.ndim == 2 else places[None])
        states = layer(states[None], attention_mask=mask[None, None], position_embeddings=rotary, use_cache=False)[0]
        states = states if after_layer is None else after_layer(number, states, left)
    shown = (torch.arange(length)[:, None] >= left).sum(1) - 1
    return language_model.norm(states)[shown.clamp(min=0)]
