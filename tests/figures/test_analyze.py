"""`hivtp analyze`: dispersion held against plain loops, of the scores that pruning reads."""

import itertools
import json
import math
import statistics
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from checkpoints import GEOMETRY
from hivtp_hf import cli
from hivtp_hf.figures.dispersion import (
    Dispersion,
    dispersion_by_layer,
    mean_pairwise_distance,
    most_attended_cells,
    plot_dispersion,
)
from hivtp_hf.pruning import features as pruned_features
from layouts import views
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import TOWERS, image_inputs, photo, settings, twins

LAYERS = 10  # of every tiny tower
FEATURE_LAYER = 8
# The last is so narrow that un-padding leaves nothing of its crops.
SIZES = [(60, 100), (110, 40), (2, 300)]


def chosen_cells(scores, valid, top_share):
    """The best of a tile's valid cells, as (row, column), in plain Python; `scores` and `valid` are lists of rows."""
    cells = [(row, column) for row, line in enumerate(valid) for column, here in enumerate(line) if here]
    number = min(len(cells), max(2, math.floor(top_share * len(cells) + 0.5)))
    return sorted(cells, key=lambda cell: (-scores[cell[0]][cell[1]], cell))[:number]


def pairwise(cells):
    """The mean distance of all pairs; NaN without one."""
    return statistics.fmean(itertools.starmap(math.dist, itertools.combinations(cells, 2))) if len(cells) > 1 else math.nan


@pytest.mark.parametrize("top_share", [0.05, 0.2, 0.99])
@pytest.mark.parametrize("grid", [1, 5])
def test_dispersion_equals_plain_loops(grid, top_share):
    generator = torch.Generator().manual_seed(grid)
    # Few different scores, so that ties decide; all shares of valid cells, from none to all.
    scores = torch.randint(0, 4, (12, grid, grid), generator=generator).float()
    valid = torch.rand(12, grid, grid, generator=generator) < torch.linspace(0, 1.01, 12)[:, None, None]
    scores[~valid] = math.nan
    chosen = most_attended_cells(scores, valid, top_share)
    expected = [chosen_cells(*tile, top_share) for tile in zip(scores.tolist(), valid.tolist(), strict=True)]
    assert [[tuple(cell) for cell in tile.nonzero().tolist()] for tile in chosen] == [sorted(cells) for cells in expected]
    assert mean_pairwise_distance(chosen).tolist() == pytest.approx([pairwise(cells) for cells in expected], nan_ok=True)


@pytest.mark.parametrize("tower", TOWERS)
def test_layers_equal_plain_loops_over_the_scores_that_pruning_reads(tower, monkeypatch):
    pair = twins({"importance_start_layer": 0, "importance_num_layers": LAYERS}, **TOWERS[tower])
    seen, original = [], pruned_features.choose_and_merge
    monkeypatch.setattr(pruned_features, "choose_and_merge", lambda evidence: seen.append(evidence) or original(evidence))
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]

    def evidence_of_pruning():
        for image in images:
            with torch.no_grad():
                inputs = pair.processor(images=image, text="<image>", return_tensors="pt")
                pair.pruned.model.get_image_features(**image_inputs(inputs))
        valid = torch.cat([views(layout) for evidence in seen for layout in evidence.layouts])
        kinds = [evidence.received or evidence.class_attention for evidence in seen]
        scores = {layer: torch.cat([kind[layer] for kind in kinds]).view_as(valid) for layer in kinds[0]}
        seen.clear()
        return valid, scores

    def expected_curve(valid, scores):
        chosen = [chosen_cells(*tile, 0.3) for tile in zip(scores.tolist(), valid.tolist(), strict=True)]
        return statistics.fmean(pairwise(cells) for cells in chosen if len(cells) > 1)

    with settings(pair, {"method": "uniform", "token_budget": 1}):  # less than the newlines of any image
        found = dispersion_by_layer(pair.pruned, pair.processor, iter(images), 0.3)
    valid, scores = evidence_of_pruning()
    assert found.received == pytest.approx([expected_curve(valid, scores[layer]) for layer in range(LAYERS)])
    at_random = [pairwise(tile.nonzero().tolist()) for tile in valid if tile.sum() > 1]
    assert found.at_random == pytest.approx(statistics.fmean(at_random))
    assert (found.feature_layer, found.top_share, found.num_views) == (FEATURE_LAYER, 0.3, len(at_random))
    assert (len(at_random) < len(valid)) == ("NeXT" in tower)  # tiles of which un-padding leaves nothing
    if "SigLIP" in tower:
        assert found.class_token is None
        return
    assert len(found.class_token) == LAYERS
    for layer in (0, FEATURE_LAYER, LAYERS - 1):
        pair.pruned.config.pruning_config = {"method": "cls_attention", "layer": layer}
        valid, scores = evidence_of_pruning()
        assert found.class_token[layer] == pytest.approx(expected_curve(valid, scores[layer]))


def test_what_has_no_dispersion():
    scores, valid = torch.ones(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`scores` has shape"):
        most_attended_cells(scores[:1], valid, 0.2)
    scores[1, 2, 2] = math.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        most_attended_cells(scores, valid, 0.2)
    pair = twins(family="llava", tile_size=7, patch_size=7)
    with pytest.raises(ValueError, match="no tile has two cells"):
        dispersion_by_layer(pair.pruned, pair.processor, [photo(60, 100)])
    with pytest.raises(ValueError, match="holds no image"):
        dispersion_by_layer(pair.pruned, pair.processor, [])


def test_the_figure_shows_the_curves():
    received, class_token = [float(layer) for layer in range(10, 20)], [float(layer) for layer in range(20, 10, -1)]
    (axes,) = plot_dispersion(
        Dispersion(list(range(len(received))), received, class_token, 4.0, FEATURE_LAYER, 0.2, 7), [6, 7, 8]
    ).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["attention received"] == received
    assert lines["attention of the class token"] == class_token
    assert lines["cells at random"] == [4.0, 4.0]
    assert [patch.get_x() for patch in axes.patches] == [5.5, 6.5, 7.5]


def run(*arguments):
    """Runs the command line. Errors come through, as its `main` gets them."""
    return CliRunner().invoke(cli.app, ["analyze", *map(str, arguments)], catch_exceptions=False)


def test_the_command(tmp_path, monkeypatch):
    """Of a tower that is too shallow for the settings: it is there to be asked which layers there are."""
    checkpoint = build_stock_checkpoint(tmp_path / "shallow", family="llava", vision_layers=7, **GEOMETRY)
    images = [tmp_path / f"photo {number}.png" for number in range(2)]
    for image in images:
        photo(60, 100).save(image)
    folder = tmp_path / "new" / "folder"
    table = run(checkpoint, *images, "-o", folder).output
    report = json.loads(run(checkpoint, *images, "--json", "--device", "cpu").stdout)
    assert (report["scored_layers"], report["feature_layer"], report["num_views"]) == ([6], 5, 2)
    for layer, distances in enumerate(zip(report["received"], report["class_token"], strict=True)):
        mark = {5: ["feature"], 6: ["scored"]}.get(layer, [])
        assert [str(layer), *(f"{distance:.2f}" for distance in distances), *mark] in map(str.split, table.splitlines())
    with Image.open(folder / "dispersion.png") as figure:
        assert figure.convert("L").getextrema()[0] < 100
    assert table.splitlines()[-1] == str(folder / "dispersion.png")

    monkeypatch.setattr("hivtp_hf.cli.command_analyze.open_source", lambda *arguments, **keywords: pytest.fail("too late"))
    for options, said in [
        (["-o", folder], r"dispersion\.png exists already.*--force"),
        ([folder / "dispersion.png", "-o", folder, "--force"], "would replace the image"),
        ([tmp_path / "missing.png"], r"missing\.png cannot be read"),
        (["--top-share", 1], "`top_share` is 1"),
        (["--top-share", 20], "`top_share` is 20"),
        (["--device", "gpu"], "`--device` is 'gpu', which cannot be used here: .+[^.]\\. Give auto"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(checkpoint, *images, *options)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[plots\]"'):
        run(checkpoint, *images, "-o", tmp_path / "other")
    monkeypatch.undo()
    before = (folder / "dispersion.png").read_bytes()
    (folder / "dispersion.png").write_text("mine")
    run(checkpoint, *images, "-o", folder, "--force")
    assert (folder / "dispersion.png").read_bytes() == before
