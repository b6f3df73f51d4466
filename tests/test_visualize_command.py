"""`hivtp visualize` and `plot_kept_cells`: figures of what is kept, with the very scores that the selectors saw."""

import itertools
import os
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from checkpoints import GEOMETRY
from families import FAMILIES
from forked import run_python
from hivtp_hf import TokenLayout
from hivtp_hf.cli.command_visualize import visualize
from hivtp_hf.figures import figures
from hivtp_hf.figures.image_choice import choice_of_image
from hivtp_hf.figures.score_maps import DPI, PANEL_SIDE, plot_kept_cells
from hivtp_hf.pruning.registry import METHODS
from nightly import mostly_nightly
from tested_methods import TESTED
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import TOWERS, image_inputs, photo, twins

SCORED = [name for name, method in METHODS.items() if method.load_selector().scores is not None]
app = typer.Typer()
app.command()(visualize)


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request, tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp(request.param) / "stock", family=request.param, **GEOMETRY)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("llava") / "stock", family="llava", **GEOMETRY)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / "wide [1].jpg", tmp_path / "tall.png"]
    for path, (height, width) in zip(paths, [(60, 100), (110, 40)], strict=True):
        photo(height, width).save(path)
    return paths


def run(*arguments):
    """Runs the command; its output. Errors come through, as the command line's `main` gets them."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def settings_of(method, ratio=0.25):
    return {"method": method, **TESTED[method].small, **({} if method == "none" else {"retention_ratio": ratio})}


def options_of(settings):
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]


def choice_of(pair, image, layout):
    inputs = pair.processor(images=image, text="<image>", return_tensors="pt")
    return inputs, choice_of_image(pair.pruned, inputs, layout)


def drawn_scores(monkeypatch):
    """The scores that reach `plot_kept_cells`, as a list that fills."""
    seen, original = [], figures.plot_kept_cells

    def record(image, layout, kept_indices, scores=None, title=None):
        seen.append((layout, kept_indices, scores))
        return original(image, layout, kept_indices, scores, title)

    monkeypatch.setattr(figures, "plot_kept_cells", record)
    return seen


@pytest.mark.once
@pytest.mark.parametrize("method", mostly_nightly(METHODS, lambda method: method in ("hivtp", "random")))
def test_a_figure_for_every_image(stock, images, tmp_path, method, monkeypatch):
    seen = drawn_scores(monkeypatch)
    folder = tmp_path / "new" / "figures"
    result = run(stock, *images, "-o", folder, *options_of(settings_of(method)))
    assert result.exit_code == 0
    files = [folder / f"{path.stem}_{method}.png" for path in images]
    assert result.output.splitlines()[-2:] == [str(path) for path in files]
    assert sorted(folder.iterdir()) == sorted(files)
    for path, (layout, _, scores) in zip(files, seen, strict=True):
        assert (scores is not None) == (method in SCORED)
        rows = 2 if layout.num_tiles > 1 and method in SCORED else 1
        height, width = layout.image_size
        panel_width, panel_height = (round(side * PANEL_SIDE / max(height, width)) for side in (width, height))
        columns = 2 if layout.num_tiles > 1 or method in SCORED else 1
        with Image.open(path) as figure:
            assert np.ptp(np.asarray(figure.convert("L"))) > 200
            assert figure.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
            assert columns * panel_width < figure.width < columns * panel_width + 1500
            assert rows * panel_height < figure.height < rows * panel_height + 700


@pytest.mark.parametrize(
    ("method", "tower"),
    mostly_nightly(itertools.product(METHODS, TOWERS), lambda method, tower: tower.endswith(", CLIP") or method == "hivtp"),
)
def test_the_choice_is_the_models_own(method, tower, monkeypatch):
    if method == "cls_attention" and "SigLIP" in tower:
        pytest.skip("no class token")
    pair, image = twins(settings_of(method), **TOWERS[tower]), photo(60, 100)
    layout = pair.processor.token_layout(60, 100)
    inputs, choice = choice_of(pair, image, layout)
    with torch.no_grad():
        own = pair.pruned.model.get_image_features(**image_inputs(inputs)).kept_indices[0]
    assert torch.equal(choice.kept_indices, own)
    if method not in SCORED:
        assert choice.scores is None
        return
    assert choice.scores.shape == layout.valid.shape
    assert choice.scores.dtype == torch.float32
    assert choice.scores[layout.valid].isfinite().all()
    # What the selector itself is given, by the model's own pass.
    name = f"select_{method}"
    module = sys.modules[f"hivtp_hf.selectors_{method}"]
    given, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: given.append(arguments) or original(*arguments))
    with torch.no_grad():
        pair.pruned.model.get_image_features(**image_inputs(inputs))
    (arguments,) = given
    if method == "gprune":
        packed, shows_cell = arguments[0][0], layout._cell_of_token >= 0
        for tiles in (range(1), range(1, layout.num_tiles)):
            graph = [p for p in shows_cell.nonzero()[:, 0].tolist() if int(layout.cells(torch.tensor([p]))[0, 0]) in tiles]
            if graph:
                expected = module.gprune_scores(packed[graph][None], layout.pruning)[0]
                tile, row, column = layout.cells(torch.tensor(graph)).unbind(1)
                assert torch.equal(choice.scores[tile, row, column], expected)
    else:
        assert torch.equal(choice.scores, arguments[1 if method == "hiprune" else 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["cls_attention", "gprune"])
def test_kept_cells_have_the_highest_scores(family, method):
    pair = twins(settings_of(method), family=family)
    layout = pair.processor.token_layout(60, 100)
    _, choice = choice_of(pair, photo(60, 100), layout)
    kept = torch.zeros_like(layout.valid)
    kept[tuple(layout.cells(choice.kept_indices).unbind(1))] = True
    # gprune chooses from all crops at once, the class token's attention within each tile.
    starts = (0, 1) if method == "gprune" else range(layout.num_tiles)
    for start in starts:
        tiles = slice(start, None if method == "gprune" and start else start + 1)
        if layout.valid[tiles].any():
            chosen, others = kept[tiles], layout.valid[tiles] & ~kept[tiles]
            assert 0 < chosen.sum() < layout.valid[tiles].sum()
            assert choice.scores[tiles][chosen].min() >= choice.scores[tiles][others].max()


def test_the_layouts_settings_rule():
    pair = twins({"method": "random"}, family="llava")
    pair.processor.pruning_config = {"method": "cls_attention", "retention_ratio": 0.5}
    _, choice = choice_of(pair, photo(60, 100), pair.processor.token_layout(60, 100, token_budget=10))
    assert len(choice.kept_indices) == 10
    assert choice.scores is not None
    inputs = pair.processor(images=[photo(60, 100)] * 2, text="<image><image>", return_tensors="pt")
    with pytest.raises(ValueError, match="2 images"):
        choice_of_image(pair.pruned, inputs, pair.processor.token_layout(60, 100))


def small_layout(height, width, **pruning):
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    return TokenLayout.from_image_size(height, width, pruning, tile_size=56, patch_size=7, pinpoints=pinpoints)


def pictures_and_bars(figure):
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    return pictures, [axes for axes in figure.axes if not axes.images]


def test_a_cell_has_the_colour_of_its_score():
    image, layout = Image.new("RGB", (480, 480), (128, 128, 128)), small_layout(480, 480, retention_ratio=0.5)
    order = torch.randperm(layout.valid.numel(), generator=torch.Generator().manual_seed(0))
    scores = torch.linspace(1, 2, layout.valid.numel())[order].view(layout.valid.shape)
    scores[0, 2, 3], scores[1, 0, 0], scores[4, 7, 7] = 9, 0.5, 9
    figure = plot_kept_cells(image, layout, torch.arange(20), scores)
    (_, base, _, crops), bars = sorted_by_column(*pictures_and_bars(figure))
    # Outliers take the end's colour, and arrows tell.
    yellow, purple = base[300, 420], crops[30, 30]
    assert yellow[0] > yellow[2]
    assert purple[2] > purple[1]
    assert np.array_equal(crops[930, 930], yellow)
    assert [bar.get_xlabel() for bar in bars] == ["mean of layers 6 to 8"] * 2
    lowest, highest = np.quantile(scores[1:], (0.01, 0.99))
    assert bars[1].get_xlim() == pytest.approx((lowest, highest))
    # In between, more is brighter: viridis' green grows from end to end.
    middles = [(row * 120 + 60, column * 120 + 60) for row in range(8) for column in range(8)]
    greens = np.array([int(base[y, x][1]) for y, x in middles])[scores[0].flatten().argsort()]
    assert (np.diff(greens) >= 0).all()
    assert greens[-1] > greens[0] + 100


def sorted_by_column(pictures, bars):
    """Base tile first, kept cells before scores; drawn row by row."""
    kept_base, kept_crops, base, crops = pictures
    return (kept_base, base, kept_crops, crops), bars


def test_titles_and_scales():
    image, layout = photo(60, 100), small_layout(60, 100, method="cls_attention", retention_ratio=0.25)
    kept = torch.arange(40)
    scores = torch.logspace(-5, -2, layout.valid.numel()).view(layout.valid.shape)
    figure = plot_kept_cells(image, layout, kept, scores)
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == f"cls_attention, retention ratio 0.25: 40 of {layout.num_stock} tokens ({40 / layout.num_stock:.1%})"
    assert texts[1].startswith("Base tile: 40 of 64 cells kept")
    assert texts[3:] == [
        "Base tile: attention of the class token",
        f"{layout.num_tiles - 1} crops: attention of the class token",
    ]
    _, bars = pictures_and_bars(figure)
    assert [bar.get_xscale() for bar in bars] == ["log", "log"]  # both, though the base tile's alone would be linear
    own = plot_kept_cells(image, layout, kept, title="Cost: $5 and $6\nsecond line")
    assert [text.get_text() for text in own.texts][:2] == ["Cost: $5 and $6", "second line"]
    assert len(own.axes) == 2
    assert plot_kept_cells(image, layout, kept, title="").texts[0].get_text().startswith("Base tile")
    random = small_layout(60, 100, method="random")
    assert "Base tile: scores" in [text.get_text() for text in plot_kept_cells(image, random, kept, scores).texts]


@pytest.mark.once
@pytest.mark.parametrize(
    ("height", "width", "fill"),
    mostly_nightly(
        [(*size, fill) for fill in (0.0, 1.0) for size in ((2, 3000), (3000, 2), (1, 1), (2000, 1500))],
        lambda *case: case in ((2, 3000, 0.0), (3000, 2, 0.0), (1, 1, 1.0)),
    ),
)
def test_odd_sizes_and_equal_scores(height, width, fill, tmp_path):
    layout = small_layout(height, width)
    figure = plot_kept_cells(photo(height, width), layout, torch.arange(5), torch.full(layout.valid.shape, fill))
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as saved:
        assert max(saved.size) < 3 * PANEL_SIDE


def test_scores_that_do_not_fit():
    image, layout = photo(60, 100), small_layout(60, 100)
    kept, scores = torch.arange(5), torch.ones(layout.valid.shape)
    for wrong in (scores[:1], scores.long(), scores.tolist()):
        with pytest.raises(ValueError, match="`scores` is"):
            plot_kept_cells(image, layout, kept, wrong)
    with pytest.raises(ValueError, match="`image` has 61"):
        plot_kept_cells(photo(61, 100), layout, kept, scores)
    plot_kept_cells(image, layout, kept, scores.masked_fill(~layout.valid, float("nan")).bfloat16())
    scores[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="1 values that are not finite"):
        plot_kept_cells(image, layout, kept, scores)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_vector_formats_are_the_same_every_time(llava, images, tmp_path, kind):
    target = tmp_path / f"tall_hivtp.{kind}"
    contents = []
    for force in ([], ["--force"]):
        run(llava, images[1], "-o", tmp_path, "--format", kind, *force)
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]
    if kind == "svg":
        assert xml.etree.ElementTree.fromstring(contents[0]).tag.endswith("svg")
    else:
        assert contents[0].startswith(b"%PDF")
        assert b"/Type3" not in contents[0]


def test_existing_figures_stay_unless_forced(llava, images, tmp_path):
    target = tmp_path / "tall_uniform.png"
    target.write_text("mine")
    arguments = (llava, images[1], "-o", tmp_path, "--method", "uniform")
    with pytest.raises(ValueError, match=r"exists already.*--force"):
        run(*arguments)
    assert target.read_text() == "mine"
    run(*arguments, "--force")
    with Image.open(target) as figure:
        assert figure.format == "PNG"
    # Not even then where an image of the call would be lost.
    content = target.read_bytes()
    with pytest.raises(ValueError, match="would replace the image"):
        run(llava, images[1], target, "-o", tmp_path, "--method", "uniform", "--force")
    assert target.read_bytes() == content


def test_nothing_is_drawn_where_one_image_is_broken(llava, images, tmp_path):
    broken, folder = tmp_path / "broken.png", tmp_path / "figures"
    broken.write_bytes(images[1].read_bytes()[:500])
    for wrong in (broken, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=wrong.name):
            run(llava, *images, wrong, "-o", folder)
    (tmp_path / "other").mkdir()
    namesake = tmp_path / "other" / "tall.jpg"
    photo(50, 50).save(namesake)
    with pytest.raises(ValueError, match="would both be"):
        run(llava, *images, namesake, "-o", folder)
    with pytest.raises(ValueError, match="alpha"):
        run(llava, *images, "-o", folder, "--alpha", 0.5)
    assert not folder.exists()
    with pytest.raises(ValueError, match="no folder"):
        run(llava, *images, "-o", images[0])


def test_an_unfinished_figure_does_not_stay(llava, images, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr("hivtp_hf.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(llava, images[1], "-o", tmp_path / "figures")
    assert not list((tmp_path / "figures").iterdir())


def test_rotated_photographs(llava, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo(60, 100).save(tmp_path / "rotated.jpg", exif=exif)
    assert run(llava, tmp_path / "rotated.jpg", "-o", tmp_path).exit_code == 0


def test_without_matplotlib(llava, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[plots\]"'):
        run(llava, *images, "-o", tmp_path / "figures")
    with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[plots\]"'):
        plot_kept_cells(photo(60, 100), small_layout(60, 100), torch.arange(3))
    assert not (tmp_path / "figures").exists()


@pytest.mark.once
def test_matplotlib_is_imported_late_and_pyplot_never(llava, images, tmp_path):
    program = """
import sys
import typer
from hivtp_hf.cli.command_visualize import visualize
import hivtp_hf.figures.score_maps
assert "matplotlib" not in sys.modules
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(visualize)
app(sys.argv[1:], standalone_mode=False)
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    arguments = [str(argument) for argument in (llava, images[1], "-o", tmp_path)]
    run_python(["-c", program, *arguments], tmp_path, os.environ).check_returncode()


def test_every_scored_method_has_a_map():
    """A method that reads attention says in its registry entry by which scores it ranks."""
    assert set(SCORED) >= {"hivtp", "hiprune", "gprune", "cls_attention"}
    assert {name for name, tested in TESTED.items() if tested.reads_attention} <= set(SCORED)
    assert not set(SCORED) & {"random", "uniform", "none"}
    assert set(figures._WORDS) <= set(SCORED)
