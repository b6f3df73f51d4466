"""Configuration of LLaVA-1.5 with visual token pruning."""

from typing import Any, ClassVar

from transformers import LlavaConfig

from .pruned_configuration import PrunedConfigMixin, auto_map


class HIVTPLlavaConfig(PrunedConfigMixin, LlavaConfig):
    r"""
    Configuration of [`HIVTPLlavaForConditionalGeneration`]: LLaVA's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        base_model (`dict` or `None`, *optional*):
            As for [`HIVTPLlavaNextConfig`].
        **kwargs:
            As for [`~transformers.LlavaConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    A stock checkpoint ("llava") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava"
    stock_model_type: ClassVar[str] = LlavaConfig.model_type
    family_auto_map: ClassVar[dict[str, str]] = auto_map("llava", "HIVTPLlava")
    _auto_class = "AutoConfig"

    pruning_config: Any = None
    base_model: Any = None

    @staticmethod
    def model_class() -> type:
        """The model with a language modelling head that this configuration is for."""
        # Named here, the model's code travels with the configuration: where that names a base, it is the whole checkpoint.
        from .modeling_hivtp_llava import HIVTPLlavaForConditionalGeneration

        return HIVTPLlavaForConditionalGeneration


__all__ = ["HIVTPLlavaConfig"]
