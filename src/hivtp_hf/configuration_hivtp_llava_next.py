"""Configuration of LLaVA-NeXT with visual token pruning."""

from typing import Any, ClassVar

from transformers import LlavaNextConfig

from .pruned_configuration import PrunedConfigMixin, auto_map


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
