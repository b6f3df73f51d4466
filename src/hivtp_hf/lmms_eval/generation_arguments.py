"""What `generate` is told of a task's `generation_kwargs`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig

from ..pruning.checked_values import shown

_DEFAULTS = {"max_new_tokens": 1024, "num_beams": 1}
# Of sampling. What a checkpoint names for it plays no part in greedy answers.
_OF_SAMPLING = ("temperature", "top_p", "top_k")
# lmms-eval writes its delimiter of examples into every task that names no end, and its own models pass over it, too.
_NO_END = "\n\n"


class GenerationArguments(NamedTuple):
    """How to generate.

    Attributes:
        of_generate: arguments of `generate`.
        ends: an answer is cut where the first of them begins.
        unused: names that mean nothing here, such as those that are meant for another model.
    """

    of_generate: dict[str, Any]
    ends: tuple[str, ...]
    unused: tuple[str, ...]

    def cut(self, answer: str) -> str:
        """The answer up to the first end."""
        return answer[: min((place for end in self.ends if (place := answer.find(end)) >= 0), default=len(answer))]


def generation_arguments(given: Mapping[str, Any]) -> GenerationArguments:
    """How to generate by a task's `generation_kwargs`: greedily, unless `temperature` is above 0.

    Raises:
        ValueError: for an `until` that is no text and no list of texts.
    """
    until = given.get("until")
    ends = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(ends, (list, tuple)) or not all(isinstance(end, str) for end in ends):
        raise ValueError(f"`until` is {shown(until)}; it must be a text or a list of texts. Mend the task's generation_kwargs.")
    known = vars(GenerationConfig())
    rest = {name: value for name, value in given.items() if name not in ("until", "do_sample")}
    of_generate = {**_DEFAULTS, **{name: value for name, value in rest.items() if name in known and value is not None}}
    of_generate["do_sample"] = of_generate.get("temperature", 0) > 0
    if not of_generate["do_sample"]:
        of_generate |= dict.fromkeys(_OF_SAMPLING)
    unused = tuple(name for name in rest if name not in known)
    return GenerationArguments(of_generate, tuple(end for end in ends if end and end != _NO_END), unused)
