"""Runs of `hivtp evaluate`: their folders, what becomes of interrupted ones, and errors that name the row."""

import json
import re
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from checkpoints import GEOMETRY
from evaluations import ROWS, data_folder, evaluated, table_of, without_times
from hivtp_hf.checkpoints import CheckpointSource, convert_checkpoint
from hivtp_hf.evaluation import answering
from hivtp_hf.evaluation import run as run_module
from hivtp_hf.evaluation.metrics import MetricsRow
from hivtp_hf.evaluation.plot import draw_accuracy
from hivtp_hf.evaluation.run_folder import FinishedParts
from hivtp_hf.methods import uniform as selectors_uniform
from hivtp_hf.pruning.registry import METHODS
from tiny_checkpoint import build_stock_checkpoint

pytestmark = pytest.mark.once

QUICK = {"methods": "uniform,random,base-only,downsample", "ratios": "1/2", "batch_size": 1}
UNFINISHED = ["config.json", "environment.json", "partial.jsonl"]
# Of lines that stand behind others in a figure.
GREY = "#CCCCCC"
FILES = ["accuracy.png", "config.json", "environment.json", "metrics.csv", "predictions.csv"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return build_stock_checkpoint(tmp_path_factory.mktemp("next") / "My Stock", **GEOMETRY)


@pytest.fixture
def data(tmp_path):
    return data_folder(tmp_path / "data")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# What the language model is told of kept tokens beside their features: nothing.
AS_PUBLISHED = {"token_weights": "none", "weight_strength": 1.0, "positions": "packed", "stages": [], "video_scope": "frame"}


def counted_parts(monkeypatch, stop_at=None):
    """The parts that are worked through, as a list that fills; before one of them the process is killed."""
    seen, original = [], answering.PartWork.results

    def results(self, part, advance):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append([group.image_name for group in part])
        return original(self, part, advance)

    monkeypatch.setattr(answering.PartWork, "results", results)
    return seen


def test_a_run_says_what_it_was_and_what_came_out(stock, data, tmp_path):
    run = evaluated(stock, data, tmp_path / "runs", **QUICK)
    assert names_in(run.folder) == FILES
    environment = json.loads((run.folder / "environment.json").read_text())
    versions = f"torch{torch.__version__.partition('+')[0]}_transformers{environment['transformers']}"
    assert re.fullmatch(rf"my-stock_data-\d{{4}}-\d\d-\d\d_cpu-.*_{re.escape(versions)}", run.folder.name)
    config = json.loads((run.folder / "config.json").read_text())
    shared = {"exact_count": True, "keep_newlines": True, **AS_PUBLISHED}
    assert config["settings"] == dict.fromkeys(("random", "uniform"), shared)
    assert config["seeds"] == {"random": [0, 1, 2]}
    assert config["answers"]["max_new_tokens"] == 4
    assert str(stock.parent) not in (run.folder / "config.json").read_text()
    metrics = table_of(run.folder / "metrics.csv")
    by_method = {row["method"]: row for row in metrics if row["question_type"] == "all"}
    assert {name: row["n"] for name, row in by_method.items()} == {
        **{"none": "4", "random": "12", "uniform": "4"},
        **{"base-only": "4", "downsample": "4"},
    }
    assert {row["question_type"] for row in metrics} == {"all", "colour", "count"}
    predictions = table_of(run.folder / "predictions.csv")
    for method in ("base-only", "downsample"):
        kept, whole = (
            {line["image"]: int(line["patch_tokens"]) for line in predictions if line["method"] == name}
            for name in (method, "none")
        )
        assert float(by_method[method]["ratio"]) == pytest.approx(sum(kept.values()) / sum(whole.values()), rel=1e-5)
    assert all(float(row["prefill_ms"]) > 0 for row in metrics)


def test_a_folder_has_one_run_at_a_time_and_lines_that_can_be_read(tmp_path):
    path = tmp_path / "partial.jsonl"
    path.write_text('{"part": 0, "results": [1]}\n{"part"')
    parts = FinishedParts(path)
    with pytest.raises(ValueError, match="being written by another run"):
        FinishedParts(path)
    parts.add(1, [2])
    parts.close()
    assert path.read_text() == '{"part": 0, "results": [1]}\n{"part": 1, "results": [2]}\n'
    assert FinishedParts(path).results == {0: [1], 1: [2]}
    path.write_text('{"part": 0, "results": []}\nnonsense\n')
    with pytest.raises(ValueError, match="Delete the folder"):
        FinishedParts(path)


def test_an_interrupted_run_goes_on_and_ends_the_same(stock, data, tmp_path, monkeypatch):
    whole = evaluated(stock, data, tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch:
        seen = counted_parts(patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            evaluated(stock, data, tmp_path / "runs", **QUICK)
    assert seen == [["wide.png"], ["deep/tall.png"]]
    (folder,) = (tmp_path / "runs").iterdir()
    assert names_in(folder) == UNFINISHED
    # As a crash leaves it, in the middle of a line.
    content = (folder / "partial.jsonl").read_bytes()
    (folder / "partial.jsonl").write_bytes(content + content[:100])
    # Another configuration is another run.
    other = evaluated(stock, data, tmp_path / "runs", **{**QUICK, "ratios": "1/4"})
    assert other.folder != folder
    assert (folder / "partial.jsonl").exists()

    said, seen = [], counted_parts(monkeypatch)
    run = evaluated(stock, data, tmp_path / "runs", **QUICK, say=said.append)
    assert run.folder == folder
    assert seen == [["square.png"]]
    assert said == [f"Going on in {folder}: 2 of 3 parts are finished."]
    assert names_in(folder) == FILES
    assert (folder / "predictions.csv").read_bytes() == (whole.folder / "predictions.csv").read_bytes()
    assert without_times(folder / "metrics.csv") == without_times(whole.folder / "metrics.csv")


def test_a_run_whose_files_were_not_all_written_goes_on(stock, data, tmp_path, monkeypatch):
    def broken(path, *rest):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "draw_accuracy", broken)
        with pytest.raises(KeyboardInterrupt):
            evaluated(stock, data, tmp_path, methods="uniform", ratios="1/2")
    (folder,) = (path for path in tmp_path.iterdir() if path != data)
    assert "accuracy.png" not in names_in(folder)
    seen = counted_parts(monkeypatch)
    assert evaluated(stock, data, tmp_path, methods="uniform", ratios="1/2").folder == folder
    assert seen == []
    assert names_in(folder) == FILES


def test_a_finished_run_is_never_touched(stock, data, tmp_path):
    first = evaluated(stock, data, tmp_path / "runs", methods="uniform", ratios="1/2")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.folder.iterdir()}
    second = evaluated(stock, data, tmp_path / "runs", methods="uniform", ratios="1/2")
    third = evaluated(stock, data, tmp_path / "runs", methods="uniform", ratios="1/4")
    assert [run.folder.name for run in (second, third)] == [f"{first.folder.name}-{number}" for number in (2, 3)]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.folder.iterdir()} == before
    # The same questions, the same answers.
    assert (second.folder / "predictions.csv").read_bytes() == before["predictions.csv"][0]
    assert without_times(second.folder / "metrics.csv") == without_times(first.folder / "metrics.csv")


def test_what_goes_well_one_by_one_names_the_batch(stock, data, tmp_path, monkeypatch):
    refuse(monkeypatch, "greedy_answers", lambda model, processor, prompts, *rest: len(prompts) > 2)
    with pytest.raises(RuntimeError, match=r"row . .* to row . .*go well one by one .*--batch-size.*\(method none, ratio 1\)"):
        evaluated(stock, data, tmp_path / "runs", methods="uniform")


def refuse(monkeypatch, name, is_bad):
    """Lets a step of the work fail wherever something bad is among what it is given."""
    original = getattr(answering, name)

    def step(*arguments):
        if is_bad(*arguments):
            raise IndexError("out of range")
        return original(*arguments)

    monkeypatch.setattr(answering, name, step)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_error_names_the_row(stock, data, tmp_path, monkeypatch, batch_size):
    refuse(monkeypatch, "pruned_tokens", lambda seen, layouts: any(layout.image_size == (110, 40) for layout in layouts))
    message = (
        "row 2 (image 'deep/tall.png', question 'How many?'): choosing visual tokens (method none, ratio 1) failed with Index"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)) as raised:
        evaluated(stock, data, tmp_path / "runs", methods="uniform,random", ratios="1/4,1/9", batch_size=batch_size)
    assert isinstance(raised.value.__cause__, IndexError)
    # One by one, the first image was finished by then; together, nothing was.
    assert [names_in(folder) for folder in (tmp_path / "runs").iterdir()] == [UNFINISHED] * (batch_size == 1)


def test_a_broken_pruner_never_looks_like_low_accuracy(stock, data, tmp_path, monkeypatch):
    original = selectors_uniform.select_uniform

    def one_too_few(valid, pruning):
        kept = original(valid, pruning)
        kept.view(len(kept), -1)[-1, kept.view(len(kept), -1)[-1].nonzero()[0, 0]] = False
        return kept

    monkeypatch.setattr(selectors_uniform, "select_uniform", one_too_few)
    with pytest.raises(RuntimeError, match=r"row 1 .*method uniform, ratio 0.5.*selector is broken"):
        evaluated(stock, data, tmp_path / "runs", methods="uniform,random", ratios="1/2")
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("part", "message"),
    [("vision_tower", "attention scores|visual features"), ("language_model", "prefill are not finite")],
)
def test_numbers_that_are_none_stop_the_run(stock, data, tmp_path, monkeypatch, part, message):
    original = CheckpointSource.load_model

    def spoilt(*arguments, **options):
        model = original(*arguments, **options)
        layers = [weight for name, weight in getattr(model.model, part).named_parameters() if "layers.1" in name]
        layers[0].data.fill_(float("nan"))
        return model

    monkeypatch.setattr(CheckpointSource, "load_model", spoilt)
    with pytest.raises(RuntimeError, match=f"row . .*({message})"):
        evaluated(stock, data, tmp_path / "runs", methods="hivtp", ratios="1/2")
    assert not list((tmp_path / "runs").iterdir())


def test_llava_has_no_crops_to_leave_out(data, tmp_path):
    llava, said = build_stock_checkpoint(tmp_path / "stock", family="llava", **GEOMETRY), []
    run = evaluated(llava, data, tmp_path / "runs", methods="base-only,downsample", ratios="1/2,1/4", say=said.append)
    assert "base-only is left out: images of this model have one view" in said[0]
    rows = [row for row in run.metrics if row.question_type == "all"]
    assert [(row.method, row.ratio, row.patch_tokens, row.newline_tokens) for row in rows] == [
        ("none", 1, 64, 0),
        ("downsample", 25 / 64, 25, 0),
        ("downsample", 16 / 64, 16, 0),
    ]


def test_methods_that_need_a_class_token_are_left_out_where_there_is_none(data, tmp_path):
    siglip = build_stock_checkpoint(tmp_path / "stock", family="llava", vision_type="siglip_vision_model", **GEOMETRY)
    said = []
    run = evaluated(siglip, data, tmp_path / "runs", questions=1, ratios="1/4", say=said.append)
    assert said[1] == "cls_attention is left out: the vision tower has no class token."
    methods = {row.method for row in run.metrics}
    assert methods == {*METHODS, "downsample"} - {"cls_attention"}
    with pytest.raises(ValueError, match="no class token"):
        evaluated(siglip, data, tmp_path / "runs", methods="cls_attention")


def test_a_pruned_checkpoint_keeps_its_own_settings(stock, data, tmp_path):
    own = {"method": "hiprune", "object_layer": 5, "keep_newlines": False, "token_budget": 40}
    pruned = convert_checkpoint(str(stock), tmp_path / "pruned", own, config_only=True)
    options = {"methods": "hiprune,uniform", "ratios": "1/4", "questions": 2}
    run = evaluated(pruned, data, tmp_path / "runs", **options, changes=["hiprune.alpha=0.5"])
    settings = json.loads((run.folder / "config.json").read_text())["settings"]
    ours = {**own, "alpha": 0.5, "deep_layer": None, "published_borders": False, "exact_count": True, **AS_PUBLISHED}
    assert settings["hiprune"] == {name: value for name, value in ours.items() if name not in ("method", "token_budget")}
    by_method = {row.method: row for row in run.metrics if row.question_type == "all"}
    # Answers of the unpruned model are those of the stock checkpoint, newlines included.
    plain = evaluated(stock, data, tmp_path / "runs", **options)
    assert by_method["none"]._replace(prefill_ms=0) == plain.metrics[0]._replace(prefill_ms=0)
    assert by_method["hiprune"].newline_tokens == 0 < by_method["uniform"].newline_tokens == by_method["none"].newline_tokens


def test_layers_that_a_tower_has_not_can_be_set(tmp_path, data):
    shallow = build_stock_checkpoint(tmp_path / "shallow", vision_layers=4, **GEOMETRY)
    with pytest.raises(ValueError, match=r"layers 6 to 8.*`--set hivtp\.NAME=VALUE`"):
        evaluated(shallow, data, tmp_path / "runs", methods="hivtp")
    assert not (tmp_path / "runs").exists()
    changes = ["hivtp.importance_start_layer=1", "hivtp.importance_num_layers=2"]
    evaluated(shallow, data, tmp_path / "runs", methods="hivtp", ratios="1/2", changes=changes, questions=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "`--device` is 'tpu'"),
        ({"device": "cuda:99"}, "sees . CUDA devices"),
        ({"dtype": "int8"}, "`--dtype` is 'int8'"),
        ({"batch_size": 0}, "`--batch-size` is 0"),
        ({"max_new_tokens": 0}, "`--max-new-tokens` is 0"),
        ({"ratios": "2"}, "`--ratios` is '2', in which '2' is no ratio"),
        ({"methods": "best"}, "'best' is unknown"),
        ({"questions": 9}, "has 4 rows"),
        ({"changes": ["hivtp=3"]}, "METHOD.NAME=VALUE"),
        ({"output": Path(__file__, "runs")}, "is no folder"),
        ({"weights_and_positions": "all"}, "`--weights-and-positions` is 'all'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(stock, data, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(CheckpointSource, "load_model", None)
    with pytest.raises(ValueError, match=message):
        evaluated(stock, data, **{"output": tmp_path / "runs", **options})
    assert not (tmp_path / "runs").exists()


def test_questions_that_name_the_image_token_are_refused(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointSource, "load_model", None)
    data = data_folder(tmp_path / "data", [ROWS[0], ("wide.png", "What does <image> show?", "cats", "colour")])
    with pytest.raises(ValueError, match=r"row 2 \(image 'wide.png'.*not one place for an image"):
        evaluated(stock, data, tmp_path / "runs")


def test_the_figure_shows_every_method(stock, data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path, **keywords: drawn.append(self) or path.write_bytes(b"png")
    )
    run = evaluated(stock, data, tmp_path / "runs", **{**QUICK, "ratios": "1,1/2,1/4"})
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["all", "colour", "count"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        assert {"uniform", "random", "downsample"} <= set(lines)
        assert {"none", "base-only"} <= {container.get_label() for container in axes.containers}
        points = [
            (row.patch_tokens + row.newline_tokens, row.accuracy)
            for row in run.metrics
            if row.question_type == axes.get_title() and row.method in ("uniform", "none")
        ]
        assert sorted(points) == sorted(zip(*lines["uniform"].get_data(), strict=True))
        assert axes.get_xscale() == "log"
    # A line for each of weights and positions, which its stroke tells.
    told = {"weights_and_positions": "published,both", "methods": "uniform", "ratios": "1/2,1/4"}
    evaluated(stock, data, tmp_path / "runs", **{**QUICK, **told})
    strokes = {line.get_label(): line.get_linestyle() for line in drawn.pop().axes[0].lines}
    assert (strokes["uniform"], strokes["uniform, both"]) == ("-", "-.")
    # Where nothing is kept, there is no logarithm.
    none_kept = [row._replace(tokens_per_layer=0.0) if row.method == "uniform" else row for row in run.metrics]
    draw_accuracy(tmp_path / "other.png", none_kept, "title")
    assert drawn[1].axes[0].get_xscale() == "symlog"
    # Without matplotlib there is none, and the run says so.
    said = []
    monkeypatch.setattr(run_module, "can_plot", lambda: False)
    run = evaluated(stock, data, tmp_path / "runs", methods="none", questions=1, say=said.append)
    assert names_in(run.folder) == FILES[1:]
    assert "matplotlib is not installed" in said[0]


def many_lines(number):
    """Metrics of so many methods, the later the better, at two ratios; of two types of questions."""
    row = MetricsRow("none", 1.0, "all", 100, 97, 0.97, 0.95, 0.99, 90.0, 10.0, 1.0, 5.0, "published", 100.0)
    methods = [row._replace(method="base-only", ratio=0.2, accuracy=0.96, tokens_per_layer=20.0)]
    for rank in range(number):
        for ratio in (0.5, 0.25):
            found = {"accuracy": (rank + ratio) / (number + 1), "tokens_per_layer": 100 * ratio}
            methods.append(row._replace(method=f"method {rank}", ratio=ratio, **found))
    return [line._replace(question_type=kind) for line in (row, *methods) for kind in ("all", "count", "shape")]


def test_of_many_methods_the_best_are_coloured_and_each_has_a_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **keywords: drawn.append(self))
    draw_accuracy(tmp_path / "few.png", many_lines(7), "title")
    draw_accuracy(tmp_path / "many.png", many_lines(17), "title")
    few, many = ([axes.get_title() for axes in figure.axes] for figure in drawn)
    assert few == ["all", "count", "shape"]
    assert many == [*few, "base-only", *(f"method {rank}" for rank in range(17))]
    best = [f"method {rank}" for rank in (16, 15, 14, 13, 12)]
    for axes in drawn[1].axes[:3]:
        coloured = {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in best}
        assert list(coloured) == best
        assert len(set(coloured.values())) == 5
        assert GREY not in coloured.values()
        # Points of twelve methods, and of the base tile.
        assert sum(line.get_color() == GREY and len(line.get_xdata()) for line in axes.lines) == 12 * 3 + 1
    assert [text.get_text() for text in drawn[1].axes[0].get_legend().get_texts()] == [*best, "others, see below", "none"]
    for method, axes in zip(many[4:], drawn[1].axes[4:], strict=True):
        assert [line.get_label() for line in axes.lines if line.get_label().startswith("method")] == [method]
        assert axes.get_ylim() == drawn[1].axes[0].get_ylim()
