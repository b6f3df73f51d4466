"""`Row`: one question about one image, and the answer that counts as right."""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageOps


class Row(NamedTuple):
    """One question.

    Attributes:
        image: what is asked about, or a function that gives it, so that not all images need be in memory at once.
        image_name: rows of the same name are about the same image, which is then encoded once.
        question: as it is put to the model.
        answer: what counts as right.
        question_type: the kind of question; empty where the data tells none apart.
    """

    image: Image.Image | Callable[[], Image.Image]
    image_name: str
    question: str
    answer: str
    question_type: str = ""

    def open_image(self) -> Image.Image:
        """The image as transformers sees it, whole and in memory: turned as its metadata say, in RGB."""
        if isinstance(self.image, Image.Image):
            return _as_seen(self.image)
        with self.image() as image:
            return _as_seen(image)


def _as_seen(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")
