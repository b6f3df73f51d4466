"""Questions about images of which no two are the same: engines keep what they have seen."""

import itertools
import sys
from collections.abc import Iterator

from examples.shapes_vqa.held_out import held_out_rows
from hivtp_hf.evaluation import Row


def about_different_images() -> Iterator[Row]:
    """Without end one held-out question about every image, of each type in turn; images have many sizes."""
    of_images = itertools.groupby(held_out_rows(sys.maxsize), lambda row: row.image_name)
    for number, (_, group) in enumerate(of_images):
        rows = list(group)
        yield rows[number % len(rows)]
