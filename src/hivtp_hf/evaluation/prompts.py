"""Prompts as a pipeline makes them, tokenised once, with a placeholder for whatever is kept of their image."""

from typing import Any, NamedTuple

from .data import EvaluationData


class Prompt(NamedTuple):
    """The token ids of a question with one image, by the processor's chat template.

    Attributes:
        before, after: what stands around the image's tokens.
        placeholder: what stands for each of these.
        without_image: all of them where nothing is kept of the image, which then vanishes from the text.
    """

    before: list[int]
    after: list[int]
    placeholder: int
    without_image: list[int]

    def ids(self, image_tokens: int) -> list[int]:
        """The token ids, where so many tokens are kept of the image."""
        if not image_tokens:
            return self.without_image
        return [*self.before, *[self.placeholder] * image_tokens, *self.after]


def prompt_of(processor: Any, question: str) -> Prompt:
    """The prompt of a question about one image.

    Raises:
        ValueError: where the text has no or several places for an image: the chat template leaves the image out, or the
            question itself names the token; and for a processor without a chat template.
    """
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = _token_ids(processor, text)
    if text.count(processor.image_token) != 1 or ids.count(processor.image_token_id) != 1:
        raise ValueError(
            f"the prompt {text!r} has not one place for an image, written {processor.image_token!r}. Use a chat template with "
            "one, and questions without that word."
        )
    place = ids.index(processor.image_token_id)
    without_image = _token_ids(processor, text.replace(processor.image_token, ""))
    return Prompt(ids[:place], ids[place + 1 :], processor.image_token_id, without_image)


def prompts_of(processor: Any, data: EvaluationData) -> list[Prompt]:
    """The prompts of all rows of some data. ValueError as `prompt_of`, which names the row."""
    prompts = []
    for number, row in enumerate(data.rows):
        try:
            prompts.append(prompt_of(processor, row.question))
        except ValueError as error:
            raise ValueError(f"{data.named(number)}: {error}") from error
    return prompts


def has_first_token(tokenizer: Any, text: str) -> bool:
    """Whether a chat template has written the first token, so that no other is to be added, as `apply_chat_template` has it."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _token_ids(processor: Any, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=not has_first_token(processor.tokenizer, text))["input_ids"]
