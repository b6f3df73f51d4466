"""`RowPrompt`: the text and the images of a row, by the chat template of a processor."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..pruning.checked_values import shown


class RowPrompt(NamedTuple):
    """What a processor is given of a row.

    Attributes:
        text: with one image token per image.
        images: in the order of their tokens.
    """

    text: str
    images: list[Image.Image]


def prompt_of_messages(processor: Any, messages: Sequence[Mapping[str, Any]], chat_template: str | None) -> RowPrompt:
    """The prompt of a chat that the model is to go on with.

    Args:
        processor: of the model.
        messages: in the form of transformers; images are PIL images or files.
        chat_template: in place of the processor's own, if given.

    Raises:
        ValueError: for videos and sounds, for images that cannot be opened, and where the text has another number of image
            tokens than there are images.
    """
    images = []
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_opened(part["image"]))
            elif part["type"] != "text":
                raise ValueError(f"the row has a {part['type']}; this model takes text and images. Leave the task out.")
    own = {} if chat_template is None else {"chat_template": chat_template}
    text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **own)
    places = text.count(processor.image_token)
    if places != len(images):
        raise ValueError(
            f"the prompt {text!r} has {places} places for images, written {processor.image_token!r}, and the row has "
            f"{len(images)} images. A question that has that word in it needs `--force_simple`; a chat template must write "
            "it once for each image."
        )
    return RowPrompt(text, images)


def messages_of_context(context: str, visuals: Sequence[Any] | None, image_token: str) -> list[dict[str, Any]]:
    """One message of a user: images where the context names them, or else in front of it.

    Args:
        context: of lmms-eval.
        visuals: of the row; None for none.
        image_token: by which a context names an image.
    """
    images = [{"type": "image", "image": visual} for visual in visuals or []]
    first, *texts = context.split(image_token)
    if not texts:
        return [{"role": "user", "content": [*images, {"type": "text", "text": context}]}]
    if len(texts) != len(images):
        raise ValueError(f"the context {context!r} names {len(texts)} images, and the row has {len(images)}.")
    content: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for image, text in zip(images, texts, strict=True):
        # Chat templates end the line of an image by themselves.
        content += [image, {"type": "text", "text": text.removeprefix("\n")}]
    return [{"role": "user", "content": content}]


def _opened(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        return Image.open(image)
    raise ValueError(f"an image of the row is {shown(image)}; it must be a PIL image or the path of a file.")
