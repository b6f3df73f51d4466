"""Checkpoints of a few kilobytes: their configuration names a base, and from_pretrained takes the weights from there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig
from transformers.utils import has_file

from .base_checkpoint import ACCESS, BaseCheckpoint
from .compat import commit_of, found_file

# Arguments of from_pretrained that concern this checkpoint and not its base.
_OWN = ("revision", "subfolder", "_commit_hash")
# By these names transformers looks for weights, in this order: each whole, or by its index.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_NAMES = tuple(f"{name}{index}" for name in WEIGHT_FILES for index in ("", ".index.json"))
# What two configurations must agree in for the weights of one to be those of the other.
_SHAPES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "image_size", "patch_size"),
)


class ConfigOnlyCheckpoint(NamedTuple):
    """A checkpoint that was found to have no weights.

    Attributes:
        name: as it was given to from_pretrained.
        folder: where its config.json lies.
        base: where its weights are.
        generation_config: what it says of generation itself, or None.
    """

    name: str
    folder: str
    base: BaseCheckpoint
    generation_config: GenerationConfig | None

    @classmethod
    def found_at(cls, name: Any, arguments: Mapping[str, Any]) -> "ConfigOnlyCheckpoint | None":
        """What `name` is if its config.json names a base; None for every other checkpoint.

        The file decides, not a configuration that was given along: that one may be meant for other weights.

        Args:
            name: a folder or a repository on the Hub.
            arguments: the keyword arguments of from_pretrained.

        Raises:
            ValueError: where config.json names a base that is none, or one beside weights of its own.
        """
        if name is None:
            return None
        where = {key: arguments[key] for key in (*ACCESS, "revision", "subfolder") if arguments.get(key) is not None}
        path = found_file(name, "config.json", where)
        base = None if path is None else _base_named_in(path)
        if path is None or base is None:
            return None
        folder = Path(path).parent
        if _has_weights(name, {**where, "revision": commit_of(path)}):
            raise weights_beside_base(name, base)
        generation = found_file(name, "generation_config.json", where)
        own_generation = None if generation is None else GenerationConfig.from_pretrained(Path(generation).parent)
        return cls(str(name), str(folder), base, own_generation)

    def arguments_for_base(self, config_class: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of from_pretrained by which the base's weights are loaded into this checkpoint's configuration.

        Raises:
            ValueError: where the base is of another architecture, or names a base itself.
            OSError: where it cannot be read.
        """
        access = {key: arguments[key] for key in ACCESS if arguments.get(key) is not None}
        self.check_base(config_class, access)
        # The base's commit rules from here on: revision, subfolder and commit so far are those of this checkpoint.
        changed = {key: value for key, value in arguments.items() if key not in _OWN}
        adapter = changed.get("adapter_kwargs") or {}
        if "_adapter_model_path" not in adapter:  # no adapter was found, and the Auto classes left our revision there
            changed["adapter_kwargs"] = {key: value for key, value in adapter.items() if key not in _OWN}
        if not self.base.is_local:
            changed |= {"revision": self.base.revision, "_commit_hash": self.base.revision}
        # A path, so that transformers itself tells settings of the configuration from arguments of the model.
        changed.setdefault("config", self.folder)
        if changed.get("generation_config") is None and self.generation_config is not None:
            changed["generation_config"] = self.generation_config
        return changed

    def check_base(self, config_class: Any, access: Mapping[str, Any]) -> None:
        """Raises what `arguments_for_base` says; `access` are arguments of from_pretrained that say where and how to look."""
        said = f"{self.name} has no weights; its config.json names {self.base} as the base that has them"
        if self.base.is_local and not os.path.isdir(self.base.name):
            raise OSError(f"{said}, and there is no such folder here. Get the folder, or convert the checkpoint anew.")
        try:
            config = config_class.from_pretrained(self.base.folder(**access))
        except OSError as error:
            raise OSError(f"{said}, and that cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"{said}, and that cannot be used: {error}") from error
        if config.base_model is not None:
            raise ValueError(
                f"{said}, and that names a base in turn, {config.base_model}. Name the one that has the weights: convert the "
                "checkpoint anew."
            )
        own = config_class.from_pretrained(self.folder)
        for part in ("text_config", "vision_config"):
            for shape in _SHAPES:
                here, there = (getattr(getattr(whole, part), shape, None) for whole in (own, config))
                if here != there:
                    raise ValueError(
                        f"{said}, and that is of another architecture: `{part}.{shape}` is {there!r} there and {here!r} here. "
                        "Convert the checkpoint anew."
                    )

    def claim(self, model: Any) -> None:
        """Gives a loaded model the name of this checkpoint, by which adapters and processors find it again."""
        model.config.name_or_path = self.name
        model.name_or_path = self.name
        # Releases to 5.22 look for further files at this commit.
        model.config._commit_hash = commit_of(Path(self.folder, "config.json"))


def weights_beside_base(name: Any, base: BaseCheckpoint) -> ValueError:
    """The error of a checkpoint that has weights, and names a base that has them: nobody can tell which are meant."""
    return ValueError(
        f"{name} has weights, and its config.json names {base} as the base that has them. Take `base_model` out of "
        "config.json to load the weights that lie there, or take them away to load the base."
    )


def _has_weights(name: Any, where: Mapping[str, Any]) -> bool:
    subfolder = where.get("subfolder", "")
    access = {key: value for key, value in where.items() if key != "subfolder"}
    try:
        return any(has_file(name, f"{subfolder}/{weights}" if subfolder else weights, **access) for weights in WEIGHT_NAMES)
    except OSError:  # loading says what is wrong
        return False


def _base_named_in(path: str) -> BaseCheckpoint | None:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading says what is wrong with it
        return None
    return BaseCheckpoint.coerce(config.get("base_model")) if isinstance(config, dict) else None
