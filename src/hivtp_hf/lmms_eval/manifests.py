"""What lmms-eval reads at its start, whichever model is asked for: the names of classes, none of which is imported here."""

from typing import Any

from ..families import FAMILIES
from ..families.base import Family

_PACKAGE = "hivtp_hf.lmms_eval"


def manifests() -> list[Any]:
    """One model for every family, such as `hivtp_llava_next`, each for tasks that write messages or a context."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=family.classes.config.model_type,
            simple_class_path=f"{_PACKAGE}.context_models.{class_name(family, 'FromContext')}",
            chat_class_path=f"{_PACKAGE}.message_models.{class_name(family, 'FromMessages')}",
        )
        for family in FAMILIES
    ]


def class_name(family: Family, ending: str) -> str:
    """The name of a family's model for lmms-eval, such as "HIVTPLlavaFromContext"."""
    return family.classes.config.__name__.removesuffix("Config") + ending
