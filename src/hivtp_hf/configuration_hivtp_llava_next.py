"""Configuration of LLaVA-NeXT with visual token pruning."""

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import LlavaNextConfig

from .pruned_configuration import PrunedConfigMixin, auto_map
from .supported_transformers import check_transformers_version  # noqa: F401

if TYPE_CHECKING:  # names what travels along, as transformers 5.6 looks no deeper; `make format` writes it
    from .attention_reduction import received_attention  # noqa: F401
    from .base_checkpoint import BaseCheckpoint  # noqa: F401
    from .call_arguments import parameters_of  # noqa: F401
    from .checked_values import shown  # noqa: F401
    from .checkpoint_keys import take_stock_keys  # noqa: F401
    from .encoder_layers import EncoderLayers  # noqa: F401
    from .generation_limits import repeats_images_by_prompt  # noqa: F401
    from .layout_arguments import positive_integer  # noqa: F401
    from .methods import Hyperparameter  # noqa: F401
    from .pruned_features import feature_layer  # noqa: F401
    from .pruned_generation import PrunedGenerationMixin  # noqa: F401
    from .pruned_model import PrunedImageFeaturesOutput  # noqa: F401
    from .pruned_pretrained import PrunedPreTrainedMixin  # noqa: F401
    from .pruning_config import check_one_budget  # noqa: F401
    from .ranking import descending_rank  # noqa: F401
    from .received_attention import ReceivedAttention  # noqa: F401
    from .retained_share import rounded_share  # noqa: F401
    from .retention_bits import bits_of_ratio  # noqa: F401
    from .selector_arguments import check_tiles  # noqa: F401
    from .selectors_cls_attention import select_cls_attention  # noqa: F401
    from .selectors_gprune import count_gprune  # noqa: F401
    from .selectors_hiprune import select_hiprune  # noqa: F401
    from .selectors_hivtp import HIVTPBudget  # noqa: F401
    from .selectors_random import select_random  # noqa: F401
    from .selectors_uniform import select_uniform  # noqa: F401
    from .surplus_placeholders import surplus_of_images  # noqa: F401
    from .token_layout import TokenLayout  # noqa: F401
    from .visual_evidence import VisualEvidence  # noqa: F401
    from .weightless_checkpoint import WeightlessCheckpoint  # noqa: F401


class HIVTPLlavaNextConfig(PrunedConfigMixin, LlavaNextConfig):
    r"""
    Configuration of [`HIVTPLlavaNextForConditionalGeneration`]: LLaVA-NeXT's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            What to keep. None and `{}` mean the defaults. Reads as a [`VisualTokenPruningConfig`], however it was given,
            and is validated wherever it is set. Given to `from_pretrained`, it replaces the stored settings as a whole.
        base_model (`dict` or `None`, *optional*):
            For a checkpoint without weights, the one that has them: `{"name": "owner/name", "revision": <commit's hash>}`, or
            a folder's absolute path and None. `from_base_model` sets it.
        **kwargs:
            As for [`~transformers.LlavaNextConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    Its own `model_type` makes transformers stop where remote code is not trusted, instead of silently loading the model
    unpruned. A stock checkpoint ("llava_next") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava_next"
    stock_model_type: ClassVar[str] = LlavaNextConfig.model_type
    family_auto_map: ClassVar[dict[str, str]] = auto_map("llava_next", "HIVTPLlavaNext")
    _auto_class = "AutoConfig"

    pruning_config: Any = None
    base_model: Any = None

    @staticmethod
    def model_class() -> type:
        """The model with a language modelling head that this configuration is for."""
        # Named here, the model's code travels with the configuration: where that names a base, it is the whole checkpoint.
        from .modeling_hivtp_llava_next import HIVTPLlavaNextForConditionalGeneration

        return HIVTPLlavaNextForConditionalGeneration


__all__ = ["HIVTPLlavaNextConfig"]
