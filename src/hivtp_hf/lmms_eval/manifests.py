"""What lmms-eval reads at its start, whichever model is asked for: names of classes, none of which is imported."""

from typing import Any

_PACKAGE = "hivtp_hf.lmms_eval"


def manifests() -> list[Any]:
    """The models `hivtp_llava_next` and `hivtp_llava`, each for tasks that write messages or a context."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=model_id,
            simple_class_path=f"{_PACKAGE}.context_models.{name}FromContext",
            chat_class_path=f"{_PACKAGE}.message_models.{name}FromMessages",
        )
        for model_id, name in (("hivtp_llava_next", "HIVTPLlavaNext"), ("hivtp_llava", "HIVTPLlava"))
    ]
