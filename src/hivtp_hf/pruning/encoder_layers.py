"""The layers of a vision encoder, of which a pass need not run those behind all that is read.

LLaVA's visual feature is the output of the last layer but one, and stock runs the last one all the same. Our models end the
pass where nothing but features is wanted, in `forward` and `generate`; the features are the same, bit for bit. A call of
`get_image_features` returns what else stock's tower says, so there every layer runs, as it does in a compiled model.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .compat import encoder_layer_class

# How many layers the pass runs that is under way; None for all of them.
_num_running: ContextVar[int | None] = ContextVar("hivtp_num_running_layers", default=None)

# Of these, transformers hands on each layer's output as it is. It may put the normalised last one in the place of another
# tower's, which in a shorter pass would be the feature's.
_TOWERS = ("clip_vision_model", "siglip_vision_model")


class EncoderLayers(nn.ModuleList):
    """Layers that end early when they are run through one after another; in all else a `ModuleList`.

    A class and no patched method, so that copies, pickles and replicas of a model go on as they did.
    """

    def __iter__(self) -> Iterator[nn.Module]:
        layers = super().__iter__()
        # Compilers cannot trace context variables; what they compile runs every layer.
        return layers if torch.compiler.is_compiling() else itertools.islice(layers, _num_running.get())


def find_layers(encoder: nn.Module, num_layers: int) -> EncoderLayers:
    """The layers of an encoder, which end early from now on where `running` says so.

    Found by type, as the path to the layers differs between releases and towers.

    Raises:
        ValueError: if there is no stack of so many layers.
    """
    for path, module in encoder.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == num_layers
            and all(isinstance(layer, encoder_layer_class()) for layer in module)
        ):
            layers = EncoderLayers(module)
            parent, _, name = path.rpartition(".")
            setattr(encoder.get_submodule(parent), name, layers)
            return layers
    raise ValueError(
        f"{type(encoder).__name__} has no stack of {num_layers} encoder layers that is recognised. Use a vision tower of "
        "transformers such as CLIPVisionModel or SiglipVisionModel."
    )


def without_unread_layers(
    stock: Callable[..., Any], vision_config: Any, vision_feature_layer: int | Sequence[int], scored_layers: Sequence[int]
) -> Callable[..., Any]:
    """`stock` without the layers that nothing is read from, where the tower is known. For calls that want features alone.

    Args:
        stock: stock's `get_image_features` with its arguments; takes further keywords.
        vision_config: of the vision tower.
        vision_feature_layer: as in a configuration: which hidden states the feature is made of.
        scored_layers: encoder layers, 0-based, that attention is read from.
    """
    if torch.compiler.is_compiling() or vision_config.model_type not in _TOWERS:
        return stock
    indices = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    states = vision_config.num_hidden_layers + 1
    if not all(-states <= index < states for index in indices):
        return stock  # which says what is wrong
    # Counted from the first hidden state, as there will be fewer.
    from_first = [index % states for index in indices]
    # The first layer runs in any case: it is what brings the states before it to light.
    num_running = max(1, *from_first, *(layer + 1 for layer in scored_layers))

    read = from_first[0] if isinstance(vision_feature_layer, int) else from_first

    def shorter(**keywords: Any) -> Any:
        token = _num_running.set(num_running)
        try:
            return stock(**keywords, vision_feature_layer=read)
        finally:
            _num_running.reset(token)

    return shorter
