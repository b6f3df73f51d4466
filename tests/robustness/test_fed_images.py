"""Any picture that may be fed: it works as stock does, with equal counts, or the error says what is wrong.

After every case a good call on the same model and processor gives what it gave before.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fed import PROMPT, check_indices
from tiny_models import image_inputs, photo

PHOTO = photo(60, 100)
PIXELS = np.asarray(PHOTO)
FIRST = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


def turned():
    """A photograph whose EXIF says that it has to be turned by 90 degrees."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    PHOTO.save(file, "JPEG", exif=exif)
    return file.getvalue()


# name: (picture, height and width that its tokens are counted for)
WORKING = {
    "1 x 1": (photo(1, 1), (1, 1)),
    "5000 x 1": (photo(5000, 1), (5000, 1)),
    "5 x 6000": (photo(5, 6000), (5, 6000)),
    "cmyk": (PHOTO.convert("CMYK"), (60, 100)),
    "greyscale with alpha": (PHOTO.convert("LA"), (60, 100)),
    "exif rotation in an opened picture": (Image.open(io.BytesIO(turned())), (60, 100)),
    "bytes, channels first": (PIXELS.transpose(2, 0, 1), (60, 100)),
    "half precision floats to 1": ((PIXELS / 255).astype(np.float16), (60, 100)),
    "batch of one tensor": (FIRST[None], (60, 100)),
    "as narrow as its channels": (np.asarray(photo(3, 3)), (3, 3)),
    "nested list with an empty row": ([[PHOTO], []], (60, 100)),
}


@pytest.mark.parametrize("name", WORKING)
def test_pictures_that_work_as_stock_does(bench, name):
    picture, size = WORKING[name]
    bench.check_sizes(bench.check_as_stock(picture, PROMPT), [size])


def test_a_file_is_read_and_its_exif_rotation_followed(bench, tmp_path):
    file = tmp_path / "turned.jpg"
    file.write_bytes(turned())
    bench.check_sizes(bench.check_as_stock(str(file), PROMPT), [(100, 60)])


def test_a_batch_in_one_array(bench):
    inputs = bench.check_as_stock(FIRST[None].repeat(3, 1, 1, 1), [PROMPT, "<image> and <image>?"])
    bench.check_sizes(inputs, [(60, 100)] * 3)


NO_PIXELS = "an image has a height or a width of 0 pixels"
# Errors of ours; stock says by itself what else cannot be read.
REFUSED = {
    "no columns": (np.zeros((60, 0, 3), np.uint8), NO_PIXELS),
    "picture without columns": (Image.new("RGB", (0, 60)), NO_PIXELS),
    "empty list": ([], "`images` is empty"),
    "empty rows": ([[], ()], r"`images` is empty: \[\[\], \(\)\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_are_refused(bench, name):
    images, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        bench.processor(images=images, text=PROMPT, return_tensors="pt")


NOT_FINITE = {
    "a tile of nan": lambda tiles: tiles[2].fill_(torch.nan),
    "all nan": lambda tiles: tiles.fill_(torch.nan),
    "infinite": lambda tiles: tiles[0, :, 10:20].fill_(torch.inf),
}


def five_tiles(bench):
    """The inputs of one image of five tiles, or of five images of one."""
    number = 1 if bench.is_told_sizes else 5
    pictures = [photo(60, 100, seed) for seed in range(number)]
    return bench.processor(images=pictures, text="<image>" * number, return_tensors="pt")


def kept_cells(bench, inputs):
    """Of each of the five tiles the cells that are kept."""
    with torch.no_grad():
        kept_indices = bench.model.model.get_image_features(**image_inputs(inputs)).kept_indices
    layout = bench.processor.token_layout(60, 100)
    for kept in kept_indices:
        check_indices(kept, layout)
    of_images = [layout.cells(kept) for kept in kept_indices]
    return [cells[cells[:, 0] == tile, 1:] for cells in of_images for tile in range(layout.num_views)]


@pytest.mark.parametrize("name", NOT_FINITE)
def test_pixels_that_are_no_numbers_keep_as_many_valid_cells(bench, name):
    clean, inputs = five_tiles(bench), five_tiles(bench)
    NOT_FINITE[name](inputs["pixel_values"].view(5, 3, 56, 56))
    bench.check_model(inputs)
    kept, kept_clean = kept_cells(bench, inputs), kept_cells(bench, clean)
    assert len(kept) == len(kept_clean) == 5
    if name == "a tile of nan":  # what one tile shows does not change what is kept of the others
        assert not torch.equal(kept.pop(2), kept_clean.pop(2))
        assert all(map(torch.equal, kept, kept_clean))
