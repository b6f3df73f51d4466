"""Prompts longer than a model's context, refused before they run."""

from typing import Any

from ..families import FAMILIES

_MODELS = tuple(family.classes.model for family in FAMILIES)


def limit_prompts(generation_state: Any) -> None:
    """Has every prompt's length checked where all end points of transformers' server hand it over to be run.

    The server itself checks nothing: the model answers nonsense, at positions it was never trained for.

    Args:
        generation_state: the server's `GenerationState`. Its managers check prompts from now on.
    """
    unlimited = generation_state.get_manager
    generation_state.get_manager = lambda *args, **kwargs: _LimitedManager(unlimited(*args, **kwargs))


class _LimitedManager:
    """A generation manager of the server's that refuses prompts which do not fit; all else is as it was."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    # Not a generator: an error must come before the answer has begun, when the status can still say so.
    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        check_prompt_fits(model, inputs)
        return self._manager.generate_streaming(model, processor, inputs, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        check_prompt_fits(model, inputs)
        return await self._manager.generate_non_streaming(model, processor, inputs, *args, **kwargs)


def check_prompt_fits(model: Any, inputs: Any) -> None:
    """A ValueError where a prompt leaves no room for an answer in the context of a model of ours.

    Args:
        model: any; those that are not ours are left alone.
        inputs: with `input_ids`, a tensor (1, length).
    """
    if not isinstance(model, _MODELS):
        return
    length, context = inputs["input_ids"].shape[-1], model.config.get_text_config().max_position_embeddings
    if length >= context:
        raise ValueError(
            f"the prompt has {length} tokens, those of images included; the model's context holds {context}, and the answer "
            "needs at least one of them. Shorten the text, send fewer images, or have a smaller share of their tokens kept."
        )
