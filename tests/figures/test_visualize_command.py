"""`hivtp visualize` and `plot_kept_cells`: figures of what is kept, with the very scores that the selectors saw."""

import itertools
import sys

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from checkpoints import GEOMETRY
from families import FAMILIES
from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.cli.command_visualize import visualize
from hivtp_hf.figures import score_maps as figures
from hivtp_hf.figures.image_choice import choice_of_image
from hivtp_hf.figures.score_maps import DPI, PANEL_SIDE, plot_kept_cells
from hivtp_hf.pruning.registry import METHODS
from layouts import views
from nightly import mostly_nightly
from tested_methods import TESTED
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import TOWERS, image_inputs, photo, twins

SCORED = [name for name, method in METHODS.items() if method.ranks and method.reads(VisualTokenPruningConfig(name))[0]]
app = typer.Typer()
app.command()(visualize)


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {family: build_stock_checkpoint(folder / family, family=family, **GEOMETRY) for family in FAMILIES}


@pytest.fixture
def images(tmp_path):
    """One is as wide as high in its file, but for a rotation by 90 degrees that its EXIF data names."""
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / "rotated [1].jpg", tmp_path / "tall.png"]
    photo(60, 100).save(paths[0], exif=exif)
    photo(110, 40).save(paths[1])
    return paths


def run(*arguments):
    """Runs the command; its output. Errors come through, as the command line's `main` gets them."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def settings_of(method):
    return {"method": method, **TESTED[method].small, **({} if method == "none" else {"retention_ratio": 0.25})}


def choice_of(pair, image, layout):
    inputs = pair.processor(images=image, text="<image>", return_tensors="pt")
    return inputs, choice_of_image(pair.pruned, inputs, layout)


@pytest.mark.once
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["hivtp", "random"])
def test_a_figure_for_every_image(stocks, family, images, tmp_path, method, monkeypatch):
    seen, original = [], figures.plot_kept_cells
    monkeypatch.setattr(figures, "plot_kept_cells", lambda *drawn: seen.append(drawn) or original(*drawn))
    folder = tmp_path / "new" / "figures"
    result = run(stocks[family], *images, "-o", folder, "--method", method, "--retention-ratio", 0.25)
    files = [folder / f"{path.stem}_{method}.png" for path in images]
    assert result.output.splitlines()[-2:] == [str(path) for path in files]
    assert sorted(folder.iterdir()) == sorted(files)
    assert [layout.image_size for _, layout, *_ in seen] == [(100, 60), (110, 40)]
    for path, (_, layout, _, scores) in zip(files, seen, strict=True):
        assert layout.pruning.retention_ratio == 0.25
        assert (scores is not None) == (method in SCORED)
        rows = 2 if layout.num_views > 1 and method in SCORED else 1
        columns = 2 if layout.num_views > 1 or method in SCORED else 1
        panel_width = round(layout.image_size[1] * PANEL_SIDE / layout.image_size[0])
        with Image.open(path) as figure:
            assert np.ptp(np.asarray(figure.convert("L"))) > 200
            assert figure.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
            assert columns * panel_width < figure.width < columns * panel_width + 1500
            assert rows * PANEL_SIDE < figure.height < rows * PANEL_SIDE + 700


@pytest.mark.parametrize(
    ("method", "tower"),
    mostly_nightly(itertools.product(METHODS, TOWERS), lambda method, tower: tower.endswith(", CLIP") or method == "hivtp"),
)
def test_the_choice_is_the_models_own(method, tower, monkeypatch):
    if method == "cls_attention" and "SigLIP" in tower:
        pytest.skip("no class token")
    pair = twins(settings_of(method), **TOWERS[tower])
    layout = pair.processor.token_layout(60, 100)
    inputs, choice = choice_of(pair, photo(60, 100), layout)
    # What the selector itself is given, by the model's own pass.
    name = f"merge_{method}" if METHODS[method].merges else f"select_{method}"
    module = sys.modules.get(f"hivtp_hf.methods.{method}")
    given, original = [], getattr(module, name, None)
    if method in SCORED and hasattr(module, name):
        monkeypatch.setattr(module, name, lambda *arguments: given.append(arguments) or original(*arguments))
    with torch.no_grad():
        own = pair.pruned.model.get_image_features(**image_inputs(inputs)).kept_indices[0]
    assert torch.equal(choice.kept_indices, own)
    assert (choice.scores is not None) == (method in SCORED)
    if given and method not in ("gprune", "divprune"):  # which are given features
        (arguments,) = given
        assert torch.equal(choice.scores, arguments[1 if method == "hiprune" else 0].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_gprune_keeps_the_cells_with_the_highest_scores(family):
    pair = twins(settings_of("gprune"), family=family)
    layout = pair.processor.token_layout(60, 100)
    _, choice = choice_of(pair, photo(60, 100), layout)
    kept = torch.zeros_like(layout.valid)
    kept[layout.cell_numbers(choice.kept_indices)] = True
    # It chooses from the base tile, and from all crops at once.
    for chosen, valid, scores in zip(*map(layout.by_part, (kept, layout.valid, choice.scores)), strict=True):
        assert 0 < chosen.sum() < valid.sum()
        assert scores[chosen].min() >= scores[valid & ~chosen].max()


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
    of_cells = torch.linspace(1, 2, layout.num_cells)[order]
    scores = views(layout, of_cells)
    scores[0, 2, 3], scores[1, 0, 0], scores[4, 7, 7] = 9, 0.5, 9
    # Drawn row by row: the kept cells of base tile and crops, then their scores.
    (_, _, base, crops), bars = pictures_and_bars(plot_kept_cells(image, layout, torch.arange(20), scores.flatten()))
    # Outliers take the end's colour, and arrows tell.
    yellow, purple = base[300, 420], crops[30, 30]
    assert yellow[0] > yellow[2]
    assert purple[2] > purple[1]
    assert np.array_equal(crops[930, 930], yellow)
    assert [bar.get_xlabel() for bar in bars] == ["mean of middle layers"] * 2
    assert bars[1].get_xlim() == pytest.approx(np.quantile(scores[1:], (0.01, 0.99)))
    # In between, more is brighter: viridis' green grows from end to end.
    middles = [(row * 120 + 60, column * 120 + 60) for row in range(8) for column in range(8)]
    greens = np.array([int(base[y, x][1]) for y, x in middles])[scores[0].flatten().argsort()]
    assert (np.diff(greens) >= 0).all()
    assert greens[-1] > greens[0] + 100


def test_titles_and_scales():
    image, layout = photo(60, 100), small_layout(60, 100, method="cls_attention", retention_ratio=0.25)
    kept = torch.arange(40)
    scores = torch.logspace(-5, -2, layout.num_cells)
    figure = plot_kept_cells(image, layout, kept, scores)
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == f"cls_attention, retention ratio 0.25: 40 of {layout.num_stock} tokens ({40 / layout.num_stock:.1%})"
    assert texts[1].startswith("Base tile: 40 of 64 cells kept")
    assert texts[3:] == [
        "Base tile: attention of the class token",
        f"{layout.num_views - 1} crops: attention of the class token",
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
@pytest.mark.parametrize(("height", "width", "different"), [(2, 3000, 1), (3000, 2, 1), (1, 1, 2), (60, 100, 2)])
def test_odd_sizes_and_scores_from_zero_on(height, width, different, tmp_path):
    layout = small_layout(height, width)
    scores = torch.arange(layout.num_cells).float() % different
    figure = plot_kept_cells(photo(height, width), layout, torch.arange(5), scores)
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as saved:
        assert max(saved.size) < 3 * PANEL_SIDE


def test_scores_that_do_not_fit():
    image, layout = photo(60, 100), small_layout(60, 100)
    kept, scores = torch.arange(5), torch.ones(layout.num_cells)
    for wrong in (scores[:1], scores.long(), scores.tolist()):
        with pytest.raises(ValueError, match="`scores` is"):
            plot_kept_cells(image, layout, kept, wrong)
    with pytest.raises(ValueError, match="`image` has 61"):
        plot_kept_cells(photo(61, 100), layout, kept, scores)
    plot_kept_cells(image, layout, kept, scores.masked_fill(~layout.valid, float("nan")).bfloat16())
    scores[0] = float("inf")
    with pytest.raises(ValueError, match="1 values that are not finite"):
        plot_kept_cells(image, layout, kept, scores)


@pytest.mark.once
@pytest.mark.parametrize(("kind", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_vector_formats_are_the_same_every_time(stocks, images, tmp_path, kind, start):
    target = tmp_path / f"tall_hivtp.{kind}"
    contents = []
    for force in ([], ["--force"]):
        run(stocks["llava"], images[1], "-o", tmp_path, "--format", kind, *force)
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(start)
    assert b"/Type3" not in contents[0]  # a kind of font that publishers refuse


def test_what_is_wrong_is_said_before_anything_is_loaded(stocks, images, tmp_path, monkeypatch):
    monkeypatch.setattr("hivtp_hf.checkpoints.CheckpointSource.load_model", lambda *_, **__: pytest.fail("too late"))
    folder, figure, namesake = tmp_path / "figures", tmp_path / "tall_uniform.png", tmp_path / "other" / "tall.jpg"
    namesake.parent.mkdir()
    photo(50, 50).save(namesake)
    figure.write_bytes(images[1].read_bytes())
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[1].read_bytes()[:500])
    for arguments, said in [
        ([broken, "-o", folder], r"broken\.png cannot be read"),
        ([namesake, "-o", folder], "would both be"),
        (["-o", folder, "--alpha", 0.5], "alpha"),
        (["-o", images[0]], "no folder"),
        (["-o", tmp_path, "--method", "uniform"], r"tall_uniform\.png exists already.*--force"),
        ([figure, "-o", tmp_path, "--method", "uniform", "--force"], "would replace the image"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(stocks["llava"], *images, *arguments)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: run(stocks["llava"], *images, "-o", folder),
        lambda: plot_kept_cells(photo(60, 100), small_layout(60, 100), torch.arange(3)),
    ):
        with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[plots\]"'):
            draw()
    assert not folder.exists()


def test_an_unfinished_figure_does_not_stay(stocks, images, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr("hivtp_hf.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(stocks["llava"], images[1], "-o", tmp_path / "figures")
    assert not list((tmp_path / "figures").iterdir())


def test_every_scored_method_has_a_map():
    """A method that looks at something says by which scores it ranks; all but one, which draws."""
    looking = [name for name, method in METHODS.items() if method.reads(VisualTokenPruningConfig(name))[0] and name != "spread"]
    assert looking == SCORED
    assert set(figures._WORDS) <= set(SCORED)
