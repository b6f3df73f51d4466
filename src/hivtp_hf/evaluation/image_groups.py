"""Images with the questions about them, in parts that are worked through one after another."""

from collections.abc import Sequence
from typing import NamedTuple

from .rows import Row


class ImageGroup(NamedTuple):
    """An image and the questions about it: indices of rows, ascending."""

    image_name: str
    rows: tuple[int, ...]


def image_groups(rows: Sequence[Row]) -> list[ImageGroup]:
    """The images in the order in which they come up, each once with all of its rows."""
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.image_name, []).append(index)
    return [ImageGroup(name, tuple(indices)) for name, indices in members.items()]


def parts_of(groups: Sequence[ImageGroup], images: int) -> list[Sequence[ImageGroup]]:
    """The images, so many at a time. Parts depend on nothing else, so that a run that goes on meets the same ones."""
    return [groups[start : start + images] for start in range(0, len(groups), images)]
