"""Configuration of LLaVA-NeXT with visual token pruning."""

from typing import Any

from transformers import LlavaNextConfig

from .methods import pruning_method  # noqa: F401  (named so that this file travels; transformers 5.6 copies no more)
from .pruning_config import VisualTokenPruningConfig
from .ranking import descending_rank  # noqa: F401
from .selectors_hivtp import count_hivtp  # noqa: F401
from .supported_transformers import check_transformers_version  # noqa: F401

# Loaded without the package, a checkpoint finds its classes by this map, in the files that lie beside its weights.
AUTO_MAP = {
    "AutoConfig": "configuration_hivtp_llava_next.HIVTPLlavaNextConfig",
    "AutoModel": "modeling_hivtp_llava_next.HIVTPLlavaNextModel",
    "AutoModelForImageTextToText": "modeling_hivtp_llava_next.HIVTPLlavaNextForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_hivtp_llava_next.HIVTPLlavaNextForConditionalGeneration",
}


class HIVTPLlavaNextConfig(LlavaNextConfig):
    r"""
    Configuration of [`HIVTPLlavaNextForConditionalGeneration`]: LLaVA-NeXT's own, and how to prune visual tokens.

    Args:
        pruning_config (`VisualTokenPruningConfig`, `dict` or `None`, *optional*):
            What to keep. None and `{}` mean the defaults. Reads as a [`VisualTokenPruningConfig`], however it was given,
            and is validated wherever it is set. Given to `from_pretrained`, it replaces the stored settings as a whole.
        **kwargs:
            As for [`~transformers.LlavaNextConfig`].

    Raises:
        ValueError: for settings out of range, naming field, value and range.

    Its own `model_type` makes transformers stop where remote code is not trusted, instead of silently loading the model
    unpruned. A stock checkpoint ("llava_next") loads directly, and prunes at the defaults.
    """

    model_type = "hivtp_llava_next"
    _auto_class = "AutoConfig"

    pruning_config: Any = None

    def __setattr__(self, key: str, value: Any) -> None:
        # The one place that every route passes: constructor, stored file, and keywords of from_pretrained, which are set
        # on the finished object.
        if key == "pruning_config":
            value = VisualTokenPruningConfig.coerce(value)
        super().__setattr__(key, value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError):  # what becomes of JSON that is no object
            config_dict = None
        # Without one, transformers would go on with the defaults: a model of 7 billion weights, at another ratio.
        if not isinstance(config_dict, dict) or "model_type" not in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no config.json that names its `model_type`. Load a LLaVA-NeXT "
                "checkpoint with all of its files."
            )
        if config_dict.get("model_type") == LlavaNextConfig.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """As for any config, with `pruning_config` as a plain dict and the whole `auto_map`."""
        output = super().to_dict()
        output["pruning_config"] = self.pruning_config.to_dict()
        # transformers itself writes the one entry of the class that is being saved.
        output["auto_map"] = dict(AUTO_MAP)
        return output


__all__ = ["HIVTPLlavaNextConfig"]
