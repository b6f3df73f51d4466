"""What base models and models with a head share of a pretrained model: loading, missing weights, and where settings lie."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from .config_only import ConfigOnlyCheckpoint
from .settings import VisualTokenPruningConfig, check_no_setting_among

# A mixin's calls to super() reach the stock class that comes behind it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _StockModel
else:
    _StockModel = object


class PrunedPreTrainedMixin(_StockModel):
    """A model whose configuration has a `pruning_config`. Comes before the stock class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As stock; and a checkpoint whose configuration names a base is loaded from there.

        `revision` and `subfolder` are then those of the checkpoint itself, and every other argument goes to the base.

        Raises:
            ValueError: for a pruning setting outside `pruning_config`, and for a base of another architecture or one that names
                a base itself.
            OSError: where a base cannot be read.
        """
        check_no_setting_among(kwargs)
        config_only = ConfigOnlyCheckpoint.found_at(pretrained_model_name_or_path, kwargs)
        if config_only is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        arguments = config_only.arguments_for_base(cls.config_class, kwargs)
        loaded = super().from_pretrained(config_only.base.name, *args, **arguments)
        config_only.claim(loaded[0] if isinstance(loaded, tuple) else loaded)  # with it, what `output_loading_info` asks for
        return loaded

    @classmethod
    def _from_config(cls, config, **kwargs):
        # So serving engines build a model, to fill it from the files in its folder: there they would find no weights.
        if getattr(config, "base_model", None) is not None:
            raise ValueError(
                f"{config.name_or_path or 'this checkpoint'} has no weights; its configuration names {config.base_model} as "
                "the base that has them, and only from_pretrained goes there. A serving engine needs them in the folder that "
                "it serves: make a complete checkpoint with `hivtp convert CHECKPOINT TARGET`, and serve TARGET. For random "
                "weights, set `config.base_model = None`."
            )
        return super()._from_config(config, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As stock: a complete checkpoint, which names no base."""
        base, self.config.base_model = self.config.base_model, None
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.config.base_model = base

    def initialize_weights(self) -> None:
        """As stock, for missing weights of its parts as well."""
        # Of classes that are not its own, transformers assumes that they would overwrite loaded weights, and skips every
        # module without weights of its own: CLIP's attention, for one, whose missing weights then stay as they lie in memory.
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and not isinstance(part, PrunedPreTrainedMixin):
                part.initialize_weights()
        super().initialize_weights()

    @property
    def pruning_config(self) -> VisualTokenPruningConfig:
        """The settings, `config.pruning_config`. Assigned to the model, they would else lie there without effect."""
        return self.config.pruning_config

    @pruning_config.setter
    def pruning_config(self, pruning: Any) -> None:
        self.config.pruning_config = pruning
