"""What every family's configuration shares: `pruning_config` and `base_model`, validated and stored, over a stock one."""

from typing import TYPE_CHECKING, Any, ClassVar

from transformers.utils import logging

from .base_checkpoint import ACCESS, BaseCheckpoint
from .pickling_by_name import PickledByNameMixin
from .remote_code_file import RemoteCodeMixin
from .settings import SHARED_SETTINGS, VisualTokenPruningConfig, check_no_setting_among

logger = logging.get_logger(__name__)

# A mixin's calls to super() reach the stock class that comes behind it.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _StockConfig
else:
    _StockConfig = object


class PrunedConfigMixin(PickledByNameMixin, RemoteCodeMixin, _StockConfig):
    """A stock configuration that also says how to prune visual tokens. Comes before the stock class."""

    # The model type of stock checkpoints of the family.
    stock_model_type: ClassVar[str]
    # What is known of the family alone: a `Family`, as families/base.py describes it.
    family: ClassVar[Any]

    @classmethod
    def from_base_model(cls, base_model, *, revision=None, **kwargs):
        """The configuration of a checkpoint of a few kilobytes: it names `base_model`, at its commit, as what has the weights.

        `push_to_hub` of it and of a processor with the same settings makes such a checkpoint on the Hub, `save_pretrained` one
        in a folder. from_pretrained takes the weights from the base.

        Args:
            base_model (`str` or `os.PathLike`):
                A stock or pruned checkpoint of the family: a repository on the Hub, or a folder. Of one that itself names a
                base, that base is taken.
            revision (`str`, *optional*):
                A branch, tag or commit of it. The commit that it means now is recorded.
            **kwargs:
                As for `from_pretrained`; `pruning_config` above all.

        Raises:
            ValueError: for settings out of range, and a checkpoint of another family.
            OSError: where the base cannot be read.
        """
        access = {key: kwargs.pop(key) for key in ACCESS if key in kwargs}
        base = BaseCheckpoint.locate(base_model, revision=revision, **access)
        config = cls.from_pretrained(base.folder(**access), **kwargs)
        config.name_or_path = base.name
        if config.base_model is None:
            config.base_model = base
        config.architectures = [cls.family.classes.model.__name__]
        return config

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As stock. With `push_to_hub`, a ValueError where the base is a folder of this machine."""
        if push_to_hub and self.base_model is not None:
            self.base_model.check_published()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """As stock. A ValueError where the base is a folder of this machine, and a warning where there is none."""
        if self.base_model is not None:
            self.base_model.check_published()
        else:
            logger.warning(
                "This configuration names no base that has the weights. The repository loads once a model is pushed there, "
                "too. For a repository without weights, make the configuration by "
                f"`{type(self).__name__}.from_base_model(...)`."
            )
        return super().push_to_hub(*args, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        # The one place that every route passes: constructor, stored file, and keywords of from_pretrained, which are set
        # on the finished object.
        if key == "pruning_config":
            value = VisualTokenPruningConfig.coerce(value)
            self.family.check_pruning(value)
        elif key == "base_model":
            value = BaseCheckpoint.coerce(value)
        elif key in SHARED_SETTINGS:
            raise ValueError(f"`{key}` is a pruning setting; give it as `pruning_config={{{key!r}: ...}}`.")
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
                f"{pretrained_model_name_or_path} has no config.json that names its `model_type`. Load a checkpoint of the "
                f"type {cls.stock_model_type!r} with all of its files."
            )
        if config_dict["model_type"] not in (cls.stock_model_type, cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of the type {config_dict['model_type']!r}; {cls.__name__} "
                f"takes {cls.stock_model_type!r} and {cls.model_type!r}. Use the classes of its own family."
            )
        config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As stock; a pruning setting among the keywords, beside `pruning_config`, is a ValueError."""
        check_no_setting_among(kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As for any config, with `pruning_config` and `base_model` as plain dicts and the whole `auto_map`."""
        output = super().to_dict()
        output["pruning_config"] = self.pruning_config.to_dict()
        output.pop("base_model", None)
        if self.base_model is not None:
            output["base_model"] = self.base_model.to_dict()
        output["auto_map"] = self._auto_map()
        return output
