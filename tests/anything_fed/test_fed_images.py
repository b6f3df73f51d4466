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


def encoded(picture, file_format, **settings):
    file = io.BytesIO()
    picture.save(file, file_format, **settings)
    return file.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def second_frame():
    picture = opened(animated())
    picture.seek(1)
    return picture


def animated():
    return encoded(PHOTO, "GIF", save_all=True, append_images=[photo(60, 100, seed=5)])


def turned():
    """A photograph whose EXIF says that it has to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PHOTO, "JPEG", exif=exif)


# name: (picture, height and width that its tokens are counted for)
WORKING = {
    "1 x 1": (lambda: photo(1, 1), (1, 1)),
    "1 x 5000": (lambda: photo(1, 5000), (1, 5000)),
    "5000 x 1": (lambda: photo(5000, 1), (5000, 1)),
    "5 x 6000": (lambda: photo(5, 6000), (5, 6000)),
    "cmyk": (lambda: PHOTO.convert("CMYK"), (60, 100)),
    "16 bit": (lambda: Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), (60, 100)),
    "32 bit integers": (lambda: Image.fromarray(PIXELS[..., 0].astype(np.int32)), (60, 100)),
    "32 bit floats": (lambda: Image.fromarray(PIXELS[..., 0].astype(np.float32)), (60, 100)),
    "palette": (lambda: PHOTO.convert("P"), (60, 100)),
    "palette with a transparent colour": (lambda: opened(encoded(PHOTO.convert("P"), "PNG", transparency=3)), (60, 100)),
    "alpha": (lambda: PHOTO.convert("RGBA"), (60, 100)),
    "greyscale": (lambda: PHOTO.convert("L"), (60, 100)),
    "greyscale with alpha": (lambda: PHOTO.convert("LA"), (60, 100)),
    "black and white": (lambda: PHOTO.convert("1"), (60, 100)),
    "animated gif": (lambda: opened(animated()), (60, 100)),
    "second frame of a gif": (second_frame, (60, 100)),
    "exif rotation in an opened picture": (lambda: opened(turned()), (60, 100)),
    "bytes, channels last": (lambda: PIXELS, (60, 100)),
    "bytes, channels first": (lambda: PIXELS.transpose(2, 0, 1), (60, 100)),
    "floats to 1": (lambda: (PIXELS / 255).astype(np.float32), (60, 100)),
    "half precision floats to 1": (lambda: (PIXELS / 255).astype(np.float16), (60, 100)),
    "floats to 255": (lambda: PIXELS.astype(np.float64), (60, 100)),
    "64 bit integers": (lambda: PIXELS.astype(np.int64), (60, 100)),
    "booleans": (lambda: PIXELS > 100, (60, 100)),
    "tensor": (lambda: FIRST, (60, 100)),
    "tensor of floats to 1": (lambda: FIRST / 255, (60, 100)),
    "batch of one tensor": (lambda: FIRST[None], (60, 100)),
    "batch of one array": (lambda: PIXELS[None], (60, 100)),
    "as narrow as its channels": (lambda: np.asarray(photo(3, 3)), (3, 3)),
    "list": (lambda: [PHOTO], (60, 100)),
    "tuple": (lambda: (PHOTO,), (60, 100)),
    "nested list": (lambda: [[PHOTO]], (60, 100)),
    "nested list with an empty row": (lambda: [[PHOTO], []], (60, 100)),
}


@pytest.mark.parametrize("name", WORKING)
def test_pictures_that_work_as_stock_does(bench, name):
    picture, size = WORKING[name]
    inputs = bench.check_as_stock(picture(), PROMPT)
    bench.check_sizes(inputs, [size])


def test_a_file_is_read_and_its_exif_rotation_followed(bench, tmp_path):
    file = tmp_path / "turned.jpg"
    file.write_bytes(turned())
    bench.check_sizes(bench.check_as_stock(str(file), PROMPT), [(100, 60)])


@pytest.mark.parametrize("images", [FIRST[None].repeat(3, 1, 1, 1), PIXELS[None].repeat(3, 0)], ids=["tensors", "arrays"])
def test_a_batch_in_one_array(bench, images):
    inputs = bench.check_as_stock(images, [PROMPT, "<image> and <image>?"])
    bench.check_sizes(inputs, [(60, 100)] * 3)


def test_pictures_of_all_kinds_in_one_batch(bench):
    pictures = [picture() for name, (picture, _) in WORKING.items() if isinstance(picture(), Image.Image)]
    inputs = bench.check_as_stock(pictures, ["<image>"] * len(pictures))
    assert len(inputs.pixel_values) == len(pictures) > 10


FILES = {
    "random bytes": (np.random.default_rng(0).bytes(500), "cannot identify image file"),
    "empty file": (b"", "cannot identify image file"),
    "truncated png": (encoded(PHOTO, "PNG")[:800], "image file is truncated"),
    "truncated jpeg": (encoded(PHOTO, "JPEG")[:700], "image file is truncated"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_picture(bench, name, tmp_path):
    data, message = FILES[name]
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(OSError, match=message):
        bench.processor(images=str(file), text=PROMPT, return_tensors="pt")


def test_a_picture_that_ends_early_while_it_is_read(bench):
    with pytest.raises(OSError, match="image file is truncated"):
        bench.processor(images=opened(FILES["truncated png"][0]), text=PROMPT, return_tensors="pt")


OUT_OF_RANGE = "contains values outside the range"
NO_LIST = "Could not make a flat list of images"
NO_ENTRY = "only a single or a list of entries is supported"
# name: (images, type of the error, piece of its message). The ones of other types than ValueError are stock's own.
REFUSED = {
    "no pixels": (lambda: np.zeros((0, 0, 3), np.uint8), ValueError, "an image has a height or a width of 0 pixels"),
    "no columns": (lambda: np.zeros((60, 0, 3), np.uint8), ValueError, "an image has a height or a width of 0 pixels"),
    "picture without columns": (lambda: Image.new("RGB", (0, 60)), ValueError, "a height or a width of 0 pixels"),
    "no channels": (lambda: np.zeros((60, 100, 0), np.uint8), ValueError, "Unable to infer channel dimension"),
    "two channels": (lambda: PIXELS[..., :2], ValueError, "Unable to infer channel dimension"),
    "five channels": (lambda: np.concatenate([PIXELS, PIXELS[..., :2]], -1), ValueError, "Unable to infer channel dimension"),
    "one dimension": (lambda: np.zeros(0, np.uint8), ValueError, NO_LIST),
    "two dimensions": (lambda: PIXELS[..., 0], ValueError, NO_LIST),
    "empty list": (lambda: [], ValueError, "`images` is empty"),
    "empty tuple": (lambda: (), ValueError, "`images` is empty"),
    "empty row": (lambda: [[]], ValueError, r"`images` is empty: \[\[\]\]"),
    "empty rows": (lambda: [[], ()], ValueError, r"`images` is empty: \[\[\], \(\)\]"),
    "list nested too deep": (lambda: [[[PHOTO]]], ValueError, NO_LIST),
    "array of objects": (lambda: np.array([None], dtype=object), ValueError, NO_LIST),
    "none in a list": (lambda: [None], TypeError, NO_ENTRY),
    "bytes": (lambda: b"bytes", TypeError, NO_ENTRY),
    "number": (lambda: 5, TypeError, NO_ENTRY),
    "dict": (lambda: {"image": PHOTO}, TypeError, NO_ENTRY),
    "no such file": (lambda: "nowhere.png", ValueError, "Incorrect image source"),
    "negative": (lambda: PIXELS.astype(np.int16) - 300, ValueError, OUT_OF_RANGE),
    "some nan": (lambda: np.where(PIXELS > 200, np.nan, PIXELS), ValueError, OUT_OF_RANGE),
    "all nan": (lambda: np.full((60, 100, 3), np.nan, np.float32), ValueError, OUT_OF_RANGE),
    "infinite": (lambda: np.where(PIXELS > 200, np.inf, PIXELS / 255), ValueError, OUT_OF_RANGE),
    "bfloat16": (lambda: FIRST.bfloat16(), TypeError, "BFloat16"),
    "another device": (lambda: FIRST.to("meta"), TypeError, "copy the tensor to host memory"),
    "requires grad": (lambda: (FIRST / 255).requires_grad_(), RuntimeError, "requires grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_are_refused(bench, name):
    images, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        bench.processor(images=images(), text=PROMPT, return_tensors="pt")


NOT_FINITE = {
    "one nan": lambda tiles: tiles[1, 0, 3].fill_(torch.nan),
    "a tile of nan": lambda tiles: tiles[2].fill_(torch.nan),
    "all nan": lambda tiles: tiles.fill_(torch.nan),
    "infinite": lambda tiles: tiles[0, :, 10:20].fill_(torch.inf),
    "minus infinity": lambda tiles: tiles[3].fill_(-torch.inf),
    "largest number": lambda tiles: tiles[1].fill_(torch.finfo(torch.float32).max),
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
    return [cells[cells[:, 0] == tile, 1:] for cells in of_images for tile in range(layout.num_tiles)]


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
