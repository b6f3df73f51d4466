"""`hivtp analyze`: dispersion held against plain loops, the scores that pruning reads, a suggestion that follows its rule."""

import csv
import itertools
import json
import math
import random
import shlex
import statistics
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from checkpoints import GEOMETRY, build_pruned_checkpoint
from families import FAMILIES
from hivtp_hf import VisualTokenPruningConfig, cli
from hivtp_hf.analysis import (
    DispersionReport,
    LayerAnalysis,
    LayerCurve,
    analyze_layers,
    attention_share,
    evidence_of_all_layers,
    mean_pairwise_distance,
    most_attended_cells,
    suggest_start_layer,
)
from hivtp_hf.analysis.dispersion_figure import plot_dispersion
from hivtp_hf.pruning import model as pruned_model
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import SIGLIP, TOWERS, image_inputs, photo, twins

LAYERS = 10  # of every tiny tower
FEATURE_LAYER = 8
# The last is so narrow that un-padding leaves nothing of its crops.
SIZES = [(60, 100), (110, 40), (2, 300)]
KINDS = {"CLIP": {}, "SigLIP": SIGLIP}


# Plain references, cell by cell.


def chosen_cells(scores, valid, top_share):
    """The best of a tile's valid cells, as (row, column); `scores` and `valid` are lists of rows."""
    cells = [(row, column) for row, line in enumerate(valid) for column, here in enumerate(line) if here]
    number = min(len(cells), max(2, math.floor(top_share * len(cells) + 0.5)))
    return sorted(cells, key=lambda cell: (-scores[cell[0]][cell[1]], cell))[:number]


def pairwise(cells):
    """The mean distance of all pairs; None without one."""
    return statistics.fmean(itertools.starmap(math.dist, itertools.combinations(cells, 2))) if len(cells) > 1 else None


def reference_curve(scores, valid, top_share):
    """Mean dispersion over tiles of scores (tiles, grid, grid)."""
    tiles = zip(scores.tolist(), valid.tolist(), strict=True)
    found = [pairwise(chosen_cells(*tile, top_share)) for tile in tiles]
    return statistics.fmean(distance for distance in found if distance is not None)


# Dispersion


@pytest.mark.parametrize("top_share", [0.05, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("grid", [1, 2, 5, 8])
def test_dispersion_equals_plain_loops(grid, top_share):
    generator = torch.Generator().manual_seed(grid)
    # Few different scores, so that ties decide; all shares of valid cells, from none to all.
    scores = torch.randint(0, 4, (12, grid, grid), generator=generator).float()
    valid = torch.rand(12, grid, grid, generator=generator) < torch.linspace(0, 1.01, 12)[:, None, None]
    scores[~valid] = math.nan
    chosen = most_attended_cells(scores, valid, top_share)
    distances = mean_pairwise_distance(chosen)
    assert distances.dtype == torch.float64
    for tile in range(12):
        expected = chosen_cells(scores[tile].tolist(), valid[tile].tolist(), top_share)
        assert sorted(map(tuple, chosen[tile].nonzero().tolist())) == sorted(expected)
        distance = pairwise(expected)
        assert math.isnan(distances[tile]) if distance is None else float(distances[tile]) == pytest.approx(distance, abs=1e-12)
    assert not valid[0].any()  # or nothing would have been said of tiles without cells
    assert valid[-1].all()


def test_ties_go_to_the_lower_index():
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 1] = False
    chosen = most_attended_cells(torch.zeros(1, 4, 4), valid, 0.2)
    assert chosen.nonzero()[:, 1:].tolist() == [[0, 0], [0, 2], [0, 3]]
    assert float(mean_pairwise_distance(chosen)) == pytest.approx((2 + 3 + 1) / 3)


def test_a_blob_lies_closer_together_than_corners():
    blob, corners = torch.zeros(12, 12), torch.zeros(12, 12)
    blob[4:8, 5:9] = 1
    for row, column in itertools.product((0, 1, 10, 11), repeat=2):
        corners[row, column] = 1
    valid = torch.ones(2, 12, 12, dtype=torch.bool)
    chosen = most_attended_cells(torch.stack((blob, corners)), valid, 16 / 144)
    assert torch.equal(chosen, torch.stack((blob, corners)).bool())
    together, apart = mean_pairwise_distance(chosen).tolist()
    at_random = float(mean_pairwise_distance(valid)[0])
    assert together < 0.5 * at_random < at_random < apart


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_reference_is_the_expectation_over_random_cells(number):
    valid = torch.tensor([[[1, 0, 1], [1, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    choices = itertools.combinations(map(tuple, valid[0].nonzero().tolist()), number)
    expected = statistics.fmean(pairwise(cells) for cells in choices)
    assert float(mean_pairwise_distance(valid)) == pytest.approx(expected, abs=1e-12)


def test_a_large_grid():
    """Memory and rounding: every pair of 96 x 96 cells would be 85 million distances."""
    ends = torch.zeros(1, 96, 96, dtype=torch.bool)
    ends[0, 0, 0] = ends[0, 95, 95] = True
    assert float(mean_pairwise_distance(ends)) == pytest.approx(95 * math.sqrt(2), abs=1e-12)


def test_attention_share():
    scores = torch.tensor([[[4.0, 1], [3, math.nan]], [[1, 5], [1, 3]], [[1, 1], [1, 1]]])
    valid = torch.tensor([[[True, True], [True, False]], [[True, False], [True, True]], [[True, True], [True, True]]])
    chosen = most_attended_cells(scores, valid, 0.5)
    assert attention_share(scores, valid, chosen).tolist() == [7 / 8, 4 / 5, 0.5]


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, True, "0.2", None, math.nan])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match="`top_share` is"):
        most_attended_cells(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), share)


def test_tensors_that_do_not_fit():
    scores, valid = torch.ones(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    for wrong_scores, wrong_valid in [
        (scores[:1], valid),
        (scores.long(), valid),
        (scores, valid.int()),
        (scores[0], valid[0]),
    ]:
        with pytest.raises(ValueError, match=r"`(scores|valid)`"):
            most_attended_cells(wrong_scores, wrong_valid, 0.2)
        with pytest.raises(ValueError, match=r"`(scores|valid)`"):
            attention_share(wrong_scores, wrong_valid, valid)
    with pytest.raises(ValueError, match="must be bool"):
        mean_pairwise_distance(scores)
    scores[1, 2, 2] = math.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        most_attended_cells(scores, valid, 0.2)


# Which layers to score


def test_the_window_with_the_lowest_mean():
    curve = [1.0, 9, 5, 4, 6, 7, 8, 9, 9, 0]
    # Neither the first layer nor the one behind the feature layer counts, though both are lowest.
    assert suggest_start_layer(curve, 3, 8) == 2
    assert suggest_start_layer(curve, 1, 8) == 3
    assert suggest_start_layer(curve, 8, 8) == 1
    assert suggest_start_layer(curve, 1, 9) == 9
    # The curve that papers describe: middle layers low, deep ones high.
    assert suggest_start_layer([8, 7.5, 7, 6.5, 6, 5.5, 5, 5.2, 5.1, 6, 7, 8, 9, 9.5, 10, 10], 3, 14) == 6


def test_every_window_that_fits_can_win():
    starts = set()
    for start in range(1, 7):
        curve = [5.0] * 10
        curve[start : start + 3] = [4.0] * 3
        starts.add(suggest_start_layer(curve, 3, 8))
        assert suggest_start_layer(curve, 3, 8) == start
    assert starts == {1, 2, 3, 4, 5, 6}


def test_the_rule_against_plain_loops():
    generator = random.Random(0)
    for _ in range(200):
        depth = generator.randint(2, 12)
        curve = [generator.choice([1.0, 2.0, 3.0]) for _ in range(depth)]
        number, feature = generator.randint(1, depth), generator.randint(-1, depth - 1)
        windows = {start: curve[start : start + number] for start in range(1, depth) if start + number - 1 <= feature}
        expected = min(windows, key=lambda start: (sum(windows[start]), start)) if windows else None
        assert suggest_start_layer(curve, number, feature) == expected


def test_equal_windows_go_to_the_earliest():
    # Added from left to right, the later window would come out lower.
    assert 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    assert suggest_start_layer([9, 0.1, 0.2, 0.3, 0.2, 0.1, 9], 3, 6) == 1
    assert suggest_start_layer([1.0] * 9, 3, 7) == 1


def test_no_window_fits():
    assert suggest_start_layer([1.0] * 10, 9, 8) is None
    assert suggest_start_layer([1.0] * 10, 10**50, 8) is None
    assert suggest_start_layer([1.0] * 10, 1, -1) is None
    assert suggest_start_layer([1.0] * 10, 8, 8) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0, math.nan], 1, 1), "at layer 1"),
        (([1.0, math.inf], 1, 1), "at layer 1"),
        (([1.0, 1.0], 0, 1), "`num_layers` is 0"),
        (([1.0, 1.0], 1, 2), "`feature_layer` is 2"),
        (([1.0, 1.0], 1, -2), "`feature_layer` is -2"),
    ],
)
def test_suggestions_that_cannot_be_made(arguments, named):
    with pytest.raises(ValueError, match=named):
        suggest_start_layer(*arguments)


def report_of(received, settings=None, feature_layer=FEATURE_LAYER, class_token=None):
    """A report on a made-up curve; attention shares are of no interest."""
    curves = [curve and LayerCurve(tuple(curve), (0.3,) * len(curve)) for curve in (received, class_token)]
    analysis = LayerAnalysis(0.2, 2, 7, feature_layer, 4.0, *curves)
    return DispersionReport("some/checkpoint", "llava", VisualTokenPruningConfig.coerce(settings), analysis)


def test_a_report_marks_layers():
    curve = [5, 5, 5, 2, 2, 2, 5, 5, 5, 1]
    report = report_of(curve)
    assert [row.layer for row in report.rows() if row.scored] == [6, 7, 8]
    assert [row.layer for row in report.rows() if row.suggested] == [3, 4, 5]
    assert [row.layer for row in report.rows() if row.is_feature] == [8]
    assert report.relative_dispersion([3, 4, 5]) == 0.5
    assert all(row.class_token_dispersion is None for row in report.rows())
    # The window is as long as hivtp's settings say, and as by default under other methods.
    assert report_of(curve, {"importance_num_layers": 2}).suggested_layers == [3, 4]
    other = report_of(curve, {"method": "hiprune", "object_layer": 2})
    assert (other.scored_layers, other.suggested_layers) == ([2, 8], [3, 4, 5])
    assert report_of(curve, {"method": "none"}).scored_layers == []
    # Settings that ask for more layers than there are.
    deep = report_of(curve, {"importance_start_layer": 8, "importance_num_layers": 10**50})
    assert (deep.scored_layers, deep.suggested_start_layer, deep.suggested_layers) == ([8, 9], None, [])


# Whole models


@pytest.mark.parametrize("tower", TOWERS)
def test_scores_are_those_that_pruning_reads(tower, monkeypatch):
    pruning = {"importance_start_layer": 0, "importance_num_layers": LAYERS, "retention_ratio": 0.25}
    pair = twins(pruning, **TOWERS[tower])
    seen, original = [], pruned_model.prune_features
    monkeypatch.setattr(pruned_model, "prune_features", lambda evidence: seen.append(evidence) or original(evidence))
    inputs = pair.processor(images=photo(30, 112), text="<image>", return_tensors="pt")

    def evidence_of_pruning():
        with torch.no_grad():
            pair.pruned.model.get_image_features(**image_inputs(inputs))
        return seen.pop()

    expected, (got, of_class_token) = evidence_of_pruning(), evidence_of_all_layers(pair.pruned, inputs)
    assert sorted(got.scores) == sorted(expected.scores) == list(range(LAYERS))
    assert all(torch.equal(got.scores[layer], expected.scores[layer]) for layer in range(LAYERS))
    assert torch.equal(got.valid, expected.valid)
    assert got.feature_layer == expected.feature_layer == FEATURE_LAYER
    if "SigLIP" in tower:
        assert of_class_token is None
        return
    got = of_class_token
    assert torch.equal(got.valid, expected.valid)
    for layer in (0, FEATURE_LAYER, LAYERS - 1):
        pair.pruned.config.pruning_config = {"method": "cls_attention", "layer": layer}
        expected = evidence_of_pruning()
        assert torch.equal(got.scores[layer], expected.scores[layer])
        assert not torch.equal(got.scores[layer], got.scores[(layer + 1) % LAYERS])


@pytest.mark.parametrize("tower", TOWERS)
def test_an_analysis_equals_plain_loops(tower):
    pair = twins(**TOWERS[tower])
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    analysis = analyze_layers(pair.pruned, pair.processor, iter(images), 0.3)
    inputs = [pair.processor(images=image, text="<image>", return_tensors="pt") for image in images]
    received, class_token = zip(*(evidence_of_all_layers(pair.pruned, of_image) for of_image in inputs), strict=True)
    valid = torch.cat([of_image.valid for of_image in received])
    kinds = [(received, analysis.received), (class_token, analysis.class_token)]
    if "SigLIP" in tower:
        assert kinds.pop() == ((None,) * len(SIZES), None)
    for evidence, curve in kinds:
        for layer in range(LAYERS):
            scores = torch.cat([of_image.scores[layer] for of_image in evidence])
            assert curve.dispersion[layer] == pytest.approx(reference_curve(scores, valid, 0.3), abs=1e-12)
        assert len(curve.dispersion) == len(curve.attention_share) == LAYERS
        assert all(0.3 < share < 1 for share in curve.attention_share)
    random_cells = [distance for tile in valid if (distance := pairwise(tile.nonzero().tolist())) is not None]
    assert analysis.random_dispersion == pytest.approx(statistics.fmean(random_cells), abs=1e-12)
    assert (analysis.num_images, analysis.num_tiles) == (len(images), len(random_cells))
    assert (analysis.num_tiles < len(valid)) == ("NeXT" in tower)  # tiles of which un-padding leaves nothing
    assert (not valid.all()) == ("NeXT" in tower or "default" in TOWERS[tower].values())


def test_settings_of_the_model_play_no_part():
    pair = twins({"method": "uniform", "token_budget": 1}, family="llava_next")  # less than the newlines of any image
    analysis = analyze_layers(pair.pruned, pair.processor, [photo(60, 100)])
    pair.processor.pruning_config = pair.pruned.config.pruning_config = {"method": "none"}
    assert analyze_layers(pair.pruned, pair.processor, [photo(60, 100)]) == analysis
    with pytest.raises(ValueError, match="holds no image"):
        analyze_layers(pair.pruned, pair.processor, [])
    with pytest.raises(ValueError, match="`top_share` is"):
        analyze_layers(pair.pruned, pair.processor, [photo(60, 100)], 20)


def test_a_tower_of_one_cell():
    pair = twins(family="llava", tile_size=7, patch_size=7)
    with pytest.raises(ValueError, match="none of the 1 tiles has two cells"):
        analyze_layers(pair.pruned, pair.processor, [photo(60, 100)])


def test_evidence_of_several_images():
    pair = twins(family="llava_next")
    images = [photo(*size) for size in SIZES]
    batch = pair.processor(images=images, text=["<image>"] * 3, return_tensors="pt", padding=True)
    singles = [pair.processor(images=image, text="<image>", return_tensors="pt") for image in images]
    kinds = zip(*(evidence_of_all_layers(pair.pruned, one) for one in singles), strict=True)
    for got, expected in zip(evidence_of_all_layers(pair.pruned, batch), kinds, strict=True):
        assert torch.equal(got.valid, torch.cat([one.valid for one in expected]))
        for layer in range(LAYERS):
            torch.testing.assert_close(got.scores[layer], torch.cat([one.scores[layer] for one in expected]))


# The command


@pytest.fixture(scope="module", params=list(itertools.product(FAMILIES, KINDS)), ids=" ".join)
def stock(request, tmp_path_factory):
    family, kind = request.param
    folder = tmp_path_factory.mktemp(family) / kind
    return build_stock_checkpoint(folder, family=family, **GEOMETRY, **KINDS[kind])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("llava") / "stock", family="llava", **GEOMETRY)


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"photo {number}.png" for number in range(len(SIZES))]
    for seed, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        photo(*size, seed).save(path)
    return paths


def run(*arguments):
    """Runs the command line. Errors come through, as its `main` gets them."""
    return CliRunner().invoke(cli.app, ["analyze", *map(str, arguments)], catch_exceptions=False)


def test_the_command(stock, images, tmp_path):
    result = run(stock, *images, "--json", "--top-share", 0.25, "--output", tmp_path / "new" / "folder")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    family = next(family for family in FAMILIES.values() if family.stock_config.model_type == report["model_type"])
    model, processor = (part.from_pretrained(stock) for part in (family.model, family.processor))
    analysis = analyze_layers(model, processor, [photo(*size, seed) for seed, size in enumerate(SIZES)], 0.25)
    rows = report.pop("layers")
    assert [row["layer"] for row in rows] == list(range(LAYERS))
    assert [row["received_dispersion"] for row in rows] == list(analysis.received.dispersion)
    assert [row["received_share"] for row in rows] == list(analysis.received.attention_share)
    of_class_token = [row["class_token_dispersion"] for row in rows]
    assert of_class_token == (list(analysis.class_token.dispersion) if analysis.class_token else [None] * LAYERS)
    assert (analysis.class_token is None) == ("SigLIP" in str(stock))
    suggested = suggest_start_layer(analysis.received.dispersion, 3, FEATURE_LAYER)
    assert report == {
        "checkpoint": str(stock),
        "model_type": report["model_type"],
        "pruning_config": VisualTokenPruningConfig().to_dict(),
        "num_images": 3,
        "num_tiles": analysis.num_tiles,
        "top_share": 0.25,
        "random_dispersion": analysis.random_dispersion,
        "feature_layer": FEATURE_LAYER,
        "scored_layers": [6, 7, 8],
        "importance_num_layers": 3,
        "suggested_start_layer": suggested,
    }
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["dispersion.csv", "dispersion.png"]
    with Image.open(folder / "dispersion.png") as figure:
        assert min(figure.size) > 900
        assert figure.convert("L").getextrema()[0] < 100
    with (folder / "dispersion.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == lines


def test_the_table(stock, images, tmp_path):
    result = run(stock, images[0])
    assert result.exit_code == 0
    assert "…" not in result.output  # not even at the 80 columns of a pipe
    report = json.loads(run(stock, images[0], "--json").stdout)
    start = report["suggested_start_layer"]
    assert f"Suggested importance_start_layer: {start}\n" in result.output
    assert f"In layers {start} to {start + 2} the most attended cells lie closest together: " in result.output
    assert "A heuristic" in result.output
    marks = {row["layer"]: [name for name in ("scored", "suggested") if row[name]] for row in report["layers"]}
    marks[FEATURE_LAYER].append("feature")
    assert marks[6][:1] == ["scored"]
    for row in report["layers"]:
        (line,) = [line for line in result.output.splitlines() if line.split()[:1] == [str(row["layer"])]]
        assert f" {row['received_dispersion']:.2f} " in line
        assert line.strip().endswith(" ".join(marks[row["layer"]]) or "%")
        if row["class_token_dispersion"] is not None:
            assert f" {row['class_token_dispersion']:.2f} " in line
    assert any("class" in line.split() for line in result.output.splitlines()) == ("SigLIP" not in str(stock))
    assert sorted(tmp_path.iterdir()) == images  # nothing was written


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_checkpoint(family, images, tmp_path):
    pruned = build_pruned_checkpoint(tmp_path, {"method": "cls_attention", "retention_ratio": 0.2}, family)
    output = run(pruned, images[0]).output
    report = json.loads(run(pruned, images[0], "--json").stdout)
    assert report["model_type"] == f"hivtp_{family}"
    assert report["pruning_config"]["retention_ratio"] == 0.2
    assert report["scored_layers"] == [FEATURE_LAYER]
    command = f"hivtp convert {pruned} TARGET --method hivtp --importance-start-layer {report['suggested_start_layer']}"
    assert command in output.splitlines()
    # The same as of the stock checkpoint with its weights.
    stock = json.loads(run(tmp_path / "stock_source", images[0], "--json").stdout)
    for name in ("received_dispersion", "class_token_dispersion"):
        assert [row[name] for row in stock["layers"]] == [row[name] for row in report["layers"]]


def test_the_command_that_is_printed_works(llava, images, tmp_path):
    start = json.loads(run(llava, *images, "--json").stdout)["suggested_start_layer"]
    other, converted = tmp_path / "it's other", tmp_path / "converted"

    def convert(*arguments):
        assert CliRunner().invoke(cli.app, ["convert", *map(str, arguments)], catch_exceptions=False).exit_code == 0

    convert(llava, other, "--importance-start-layer", start % 6 + 1)
    output = run(other, *images).output
    assert f"Its settings read layers {start % 6 + 1} to {start % 6 + 3}: " in output
    (line,) = [line for line in output.splitlines() if line.startswith("hivtp convert ")]
    convert(*shlex.split(line.replace("TARGET", str(converted)))[2:])
    again = run(converted, *images).output
    assert "Its settings read these layers already." in again
    assert "hivtp convert" not in again
    assert f"importance_start_layer: {start}\n" in again


def test_settings_that_do_not_fit_the_tower(images, tmp_path):
    """The defaults read layers that a shallow tower lacks: a checkpoint that is in need of a suggestion."""
    shallow = build_stock_checkpoint(tmp_path / "shallow", family="llava", vision_layers=5, **GEOMETRY)
    with pytest.raises(ValueError, match="layers 6 to 8"):
        FAMILIES["llava"].model.from_pretrained(shallow)
    report = json.loads(run(shallow, images[0], "--json").stdout)
    assert report["scored_layers"] == []
    assert report["suggested_start_layer"] == 1
    assert "--importance-start-layer 1" in run(shallow, images[0]).output
    shallower = build_stock_checkpoint(tmp_path / "shallower", family="llava", vision_layers=4, **GEOMETRY)
    output = run(shallower, images[0]).output
    assert "Nothing is suggested: no 3 successive layers" in output
    assert "Set `importance_num_layers` to 2 or less." in output
    assert json.loads(run(shallower, images[0], "--json").stdout)["suggested_start_layer"] is None


def printed(report, capsys, revision=None):
    cli.command_analyze._print_suggestion(report, revision)
    return capsys.readouterr().out


def test_what_is_said_of_a_suggestion(capsys):
    said = printed(report_of([5, 5, 5, 2, 2, 2, 3, 3, 3, 1]), capsys, revision="v 1")
    assert "In layers 3 to 5 the most attended cells lie closest together: 50% of random." in said
    assert "Its settings read layers 6 to 8: 75% of random." in said
    assert "hivtp convert some/checkpoint TARGET --revision 'v 1' --importance-start-layer 3" in said
    assert "no closer than at random" not in said
    assert "That is no closer than at random" in printed(report_of([5.0] * 10), capsys)
    one = printed(report_of([5, 5, 5, 2, 2, 2, 3, 3, 3, 1], {"importance_num_layers": 1}), capsys)
    assert "In layer 3 the most attended" in one
    assert "Its settings read layer 6" in one
    assert printed(report_of([5.0] * 10, feature_layer=-1), capsys).startswith("Nothing is suggested: no layer lies")


def test_the_figure_shows_the_curves():
    received, class_token = [float(layer) for layer in range(10, 20)], [float(layer) for layer in range(20, 10, -1)]
    figure = plot_dispersion(report_of(received, class_token=class_token))
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["attention received"] == received
    assert lines["attention of the class token"] == class_token
    assert lines["cells at random"] == [4.0, 4.0]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(entries) == len(set(entries)) == 6
    shaded = {patch.get_label(): patch.get_x() for patch in axes.patches if not patch.get_label().startswith("_")}
    assert shaded == {"scored by the settings": 5.5, "suggested": 0.5}
    bare = plot_dispersion(report_of(received, {"method": "none"}, feature_layer=-1))
    assert [text.get_text() for text in bare.legends[0].get_texts()] == ["attention received", "cells at random"]


def test_existing_files_stay_unless_forced(llava, images, tmp_path):
    arguments = (llava, images[0], "-o", tmp_path)
    (tmp_path / "dispersion.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"dispersion\.csv exists already.*--force"):
        run(*arguments)
    assert (tmp_path / "dispersion.csv").read_text() == "mine"
    assert not (tmp_path / "dispersion.png").exists()
    lines = run(*arguments, "--force").output.splitlines()
    assert lines[-2:] == [str(tmp_path / "dispersion.png"), str(tmp_path / "dispersion.csv")]
    content = (tmp_path / "dispersion.png").read_bytes()
    with pytest.raises(ValueError, match="would replace the image"):
        run(llava, tmp_path / "dispersion.png", "-o", tmp_path, "--force")
    assert (tmp_path / "dispersion.png").read_bytes() == content
    run(*arguments, "--force")
    assert (tmp_path / "dispersion.png").read_bytes() == content  # the same every time
    (tmp_path / "other" / "dispersion.png").mkdir(parents=True)
    with pytest.raises(ValueError, match="give another `--output`"):
        run(llava, images[0], "-o", tmp_path / "other", "--force")
    with pytest.raises(ValueError, match="no folder"):
        run(llava, images[0], "-o", images[0])


@pytest.mark.parametrize("broken", ["os.replace", "csv.writer"])
def test_unfinished_files_do_not_stay(broken, llava, images, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(f"hivtp_hf.cli.command_analyze.{broken}", fail)
    with pytest.raises(OSError, match="disk full"):
        run(llava, images[0], "-o", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_what_is_wrong_is_said_before_anything_is_loaded(llava, images, tmp_path, monkeypatch):
    monkeypatch.setattr("hivtp_hf.cli.command_analyze.open_source", lambda *arguments, **keywords: pytest.fail("too late"))
    broken, folder = tmp_path / "broken.png", tmp_path / "new"
    broken.write_bytes(images[0].read_bytes()[:200])
    for wrong in (broken, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=f"{wrong.name} cannot be read"):
            run(llava, *images, wrong, "-o", folder)
    for share in (0, 1, 20):
        with pytest.raises(ValueError, match="`top_share` is"):
            run(llava, *images, "-o", folder, "--top-share", share)
    for device in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"`--device` is '{device}', which cannot be used here: .+[^.]\\. Give auto"):
            run(llava, *images, "-o", folder, "--device", device)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "hivtp-hf\[plots\]"'):
        run(llava, *images, "-o", folder)
    assert not folder.exists()


def test_a_device_and_no_matplotlib(llava, images, monkeypatch):
    """Tables need no matplotlib, and a device that is named is used."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(llava, images[0], "--device", "cpu", "--json").stdout == run(llava, images[0], "--json").stdout
