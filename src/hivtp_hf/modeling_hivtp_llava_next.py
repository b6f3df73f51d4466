"""LLaVA-NeXT with visual token pruning: thin subclasses of transformers' model classes."""

import functools
from typing import Any

from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .attention_reduction import received_attention  # noqa: F401
from .configuration_hivtp_llava_next import HIVTPLlavaNextConfig
from .generation_limits import check_generation  # noqa: F401
from .methods import pruning_method  # noqa: F401  (named so that this file travels; transformers 5.6 copies no more)
from .pruned_features import prune_features  # noqa: F401
from .pruned_generation import PrunedGenerationMixin
from .pruned_model import PrunedModelMixin
from .pruning_config import VisualTokenPruningConfig  # noqa: F401
from .ranking import descending_rank  # noqa: F401
from .received_attention import attach  # noqa: F401
from .selectors_hivtp import select_hivtp  # noqa: F401
from .supported_transformers import check_transformers_version  # noqa: F401
from .surplus_placeholders import move_labels  # noqa: F401
from .token_layout import TokenLayout

# transformers renames checkpoint keys by model type and knows only its own. Ours takes stock's rules, preceded by one that
# carries the Hub's vision keys into the base model as well.
register_checkpoint_conversion_mapping(
    HIVTPLlavaNextConfig.model_type,
    [
        WeightRenaming(r"^vision_tower\.vision_model\.", "model.vision_tower."),
        *(get_checkpoint_conversion_mapping("llava_next") or []),
    ],
    overwrite=True,
)


class HIVTPLlavaNextModel(PrunedModelMixin, LlavaNextModel):
    r"""
    The LLaVA-NeXT model without a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: where the settings do not fit the vision tower: layers beyond its depth, tiles that do not divide into
            patches, a feature selection that is not one feature per cell.

    Source: HIVTP, arXiv 2509.23663.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    _auto_class = "AutoModel"

    def __init__(self, config: HIVTPLlavaNextConfig):
        super().__init__(config)
        self._start_pruning()

    def _token_layout(self, height: int, width: int) -> TokenLayout:
        return TokenLayout.from_image_size(
            height,
            width,
            self.config.pruning_config,
            tile_size=self.config.vision_config.image_size,
            patch_size=self.config.vision_config.patch_size,
            pinpoints=self.config.image_grid_pinpoints,
        )

    # Takes stock's signature, which differs between releases and tells others what they may pass.
    @functools.wraps(LlavaNextModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class HIVTPLlavaNextForConditionalGeneration(PrunedGenerationMixin, LlavaNextForConditionalGeneration):
    r"""
    LLaVA-NeXT with a language modelling head, pruning its visual tokens by `config.pruning_config`.

    Loads pruned and stock LLaVA-NeXT checkpoints; `from_pretrained(stock, pruning_config={...})` sets the pruning.

    Args:
        config ([`HIVTPLlavaNextConfig`]): the configuration.

    Raises:
        ValueError: as [`HIVTPLlavaNextModel`].

    Source: HIVTP, arXiv 2509.23663.
    """

    config: HIVTPLlavaNextConfig
    config_class = HIVTPLlavaNextConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: HIVTPLlavaNextConfig):
        # Past the stock class's own constructor, which would build the stock model inside.
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = HIVTPLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(LlavaNextForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


__all__ = ["HIVTPLlavaNextForConditionalGeneration", "HIVTPLlavaNextModel"]
