"""The code of README and docs is the files in examples/, and those run; what their tables say is what was measured."""

import csv
import json
import re
import runpy
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from checkpoints import GEOMETRY, build_pruned_checkpoint
from hivtp_hf import HIVTPLlavaNextForConditionalGeneration
from hivtp_hf.pruning.registry import METHODS
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import photo
from tiny_onevision import onevision_twins
from tiny_qwen import save_qwen_checkpoint, save_stock_qwen_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Each once, though several pages may have it.
BLOCKS = list(
    dict.fromkeys(
        block
        for page in PAGES
        for block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
)
# What a reader replaces by their own, and so do we.
STOCK_NAME = "llava-hf/llava-v1.6-mistral-7b-hf"
STOCK_LLAVA_NAME = "llava-hf/llava-1.5-7b-hf"
STOCK_QWEN_NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
PRUNED_NAME = "your-name/llava-v1.6-mistral-7b-hivtp"
PRUNED_QWEN_NAME = "your-name/qwen2.5-vl-7b-hivtp"
# What lies in a clone, for a reader in its folder.
IN_A_CLONE = ("examples/shapes_vqa/shapes-llava-next", "examples/shapes_vqa/scene.png")
# These need a Hub to publish to and to load from: test_docs_hub.py has one.
WITH_A_HUB = ("publish.py", "load_published.py")


def example_files():
    return {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))}


def is_fragment(code):
    """Whether it shows one call of something that pages before it have made."""
    return "import " not in code


def test_every_block_is_an_example():
    assert len(BLOCKS) > 15
    for language, block in BLOCKS:
        assert language == "python"
        assert is_fragment(block) or block in example_files().values()


def test_links_lead_somewhere():
    for page in (
        *PAGES,
        *(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/accuracy/README.md")),
    ):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], (
                    f"{page.name}: {target}"
                )


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_methods(method):
    section = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("\n## ")[0]
    (row,) = re.findall(rf"^\| `{method}` \|.*$", section, flags=re.MULTILINE)
    for setting in METHODS[method].settings:
        assert f"`{setting.name}` {setting.default}" in row


def measured_accuracy():
    """The accuracy and interval of every method and ratio of the committed runs on held-out questions, as tables write them."""
    for metrics in sorted((ROOT / "benchmarks" / "accuracy").glob("*/metrics.csv")):
        config = json.loads(metrics.with_name("config.json").read_text(encoding="utf-8"))
        if config["data"]["name"] != "shapes-vqa" or metrics.parent.name == "all-methods":
            continue  # docs have their tables
        with metrics.open(newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                if row["question_type"] == "all":
                    value, low, high = (100 * float(row[name]) for name in ("accuracy", "ci_low", "ci_high"))
                    yield row["method"], f"{value:.1f} ({low:.1f} to {high:.1f})"


def test_the_table_of_intervals_is_what_was_measured():
    measured, text = list(measured_accuracy()), (ROOT / "benchmarks" / "accuracy" / "README.md").read_text(encoding="utf-8")
    one = r"\d+\.\d \(\d+\.\d to \d+\.\d\)"
    assert set(re.findall(one, text)) == {value for _, value in measured}
    rows = re.findall(rf"^\| `(\w+)`[^|\n]* (?:\|[^|\n]*)?((?:\| {one} ){{4}})\|$", text, flags=re.MULTILINE)
    assert len(rows) == 8
    for method, values in rows:
        assert set(re.findall(one, values)) <= {value for of_method, value in measured if of_method == method}


def rows_of(folder, name):
    for path in (folder / name, folder / "visionzip" / name):
        with path.open(newline="", encoding="utf-8") as table:
            yield from csv.DictReader(table)


def test_the_table_of_all_methods_is_what_was_measured():
    """Of one run, and of another that a method came after."""
    folder = ROOT / "benchmarks" / "accuracy" / "all-methods"
    percent, lost_and_won = {}, {}
    for row in rows_of(folder, "metrics.csv"):
        percent[row["method"], row["ratio"], row["question_type"]] = f"{100 * int(row['correct']) / int(row['n']):.1f}"
    for row in rows_of(folder, "paired.csv"):
        if row["question_type"] == "all":
            method = row["against"] if row["method"] == "hivtp" else row["method"]
            names = ("lost", "won") if row["method"] == "hivtp" else ("won", "lost")
            lost_and_won[method, row["ratio"]] = " / ".join(row[name] for name in names)
    ratios = ("0.5", "0.222222", "0.111111", "0.0555556")
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text, told = text.split("### With weights and original positions")
    with_both = dict(re.findall(r"^\| `(\w+)` \| (\d+\.\d \(.*)\|$", told, flags=re.MULTILINE))
    with (folder / "both" / "metrics.csv").open(newline="", encoding="utf-8") as table:
        of_both = {
            (row["method"], row["ratio"], row["question_type"]): f"{100 * int(row['correct']) / int(row['n']):.1f}"
            for row in csv.DictReader(table)
        }
    assert with_both.keys() == {method for method, _, _ in of_both} - {"none"}
    for method, cells in with_both.items():
        expected = [f"{of_both[method, ratio, 'all']} ({of_both[method, ratio, 'count']})" for ratio in ratios]
        assert [cell.strip() for cell in cells.split("|")[:4]] == expected
    found = dict(re.findall(r"^\| `(\w+)` \| (\d+\.\d \(.*)\|$", text, flags=re.MULTILINE))
    assert found.keys() == {method for method, _, _ in percent} - {"none", "base-only", "downsample"}
    for method, cells in found.items():
        expected = [f"{percent[method, ratio, 'all']} ({percent[method, ratio, 'count']})" for ratio in ratios]
        assert [cell.strip() for cell in cells.split("|")[:4]] == expected
    paired = dict(re.findall(r"^\| `(\w+)` \| (\d+ / \d+, .*)\|$", text, flags=re.MULTILINE))
    assert paired.keys() == found.keys() - {"hivtp"}
    for method, cells in paired.items():
        expected = [lost_and_won[method, ratio] for ratio in ratios]
        assert [cell.partition(",")[0].strip() for cell in cells.split("|")[:4]] == expected


def test_the_table_of_weights_and_positions_is_what_was_measured():
    folder, ways = ROOT / "benchmarks" / "accuracy" / "weights-and-positions", ("published", "weights", "positions", "both")
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as table:
        metrics = list(csv.DictReader(table))
    percent = {
        (row["method"], row["ratio"], row["weights_and_positions"], row["question_type"]): f"{100 * float(row['accuracy']):.1f}"
        for row in metrics
    }
    with (folder / "paired.csv").open(newline="", encoding="utf-8") as table:
        both = [row for row in csv.DictReader(table) if (row["weights_and_positions"], row["questions"]) == ("both", "all")]
    wanted = []
    for row in both:
        named = row["method"], row["ratio"]
        cells = [f"{percent[*named, way, 'all']} ({percent[*named, way, 'count']})" for way in ways]
        wanted.append(f"{row['method']} {Fraction(float(row['ratio'])).limit_denominator(36)} {' '.join(cells)}")
        right = {way: int(metric["correct"]) for metric in metrics for way in ways if _is_row(metric, named, way)}
        assert int(row["won"]) - int(row["lost"]) == right["both"] - right["published"]
        wanted[-1] += f" {row['won']} / {row['lost']}"
    text = (ROOT / "docs" / "weights_and_positions.md").read_text(encoding="utf-8")
    found, method = [], ""
    for line in re.findall(r"^\|(.* \d+ / \d+, \S+) \|$", text, flags=re.MULTILINE):
        name, ratio, *cells, last = (cell.strip() for cell in line.split("|"))
        method = name.partition("`, ")[0].strip("`") or method
        found.append(f"{method} {ratio} {' '.join(cells)} {last.partition(',')[0]}")
    assert len(wanted) == 25
    assert found[:25] == wanted


def _is_row(metric, named, way):
    return (metric["method"], metric["ratio"], metric["weights_and_positions"], metric["question_type"]) == (*named, way, "all")


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([\w./]+\.(?:py|md))`", text) if "<" not in name}
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "src" / "hivtp_hf" / name).exists(), name


@pytest.fixture(autouse=True)
def _known_methods():
    """An example registers a method, which other tests are not to see."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    stock = build_stock_checkpoint(folder / "stock", **GEOMETRY)
    llava = build_stock_checkpoint(folder / "llava", family="llava", **GEOMETRY)
    ours = {name: str(ROOT / name) for name in IN_A_CLONE}
    qwen = save_stock_qwen_checkpoint(folder / "qwen", "qwen2_5_vl")
    stocks = {STOCK_NAME: str(stock), STOCK_LLAVA_NAME: str(llava), STOCK_QWEN_NAME: str(qwen)}
    save_qwen_checkpoint(folder / "pruned_qwen", "qwen2_5_vl", {})
    pruned = {PRUNED_NAME: str(build_pruned_checkpoint(folder, {})), PRUNED_QWEN_NAME: str(folder / "pruned_qwen")}
    return {**stocks, **pruned, **ours}


@pytest.fixture(scope="module")
def deep_names(tmp_path_factory):
    """What pages about settings speak of: a class, and a checkpoint with layers enough for stages."""
    deep = build_stock_checkpoint(tmp_path_factory.mktemp("deep"), **GEOMETRY, text_layers=28)
    return {"HIVTPLlavaNextForConditionalGeneration": HIVTPLlavaNextForConditionalGeneration, "checkpoint": deep}


@pytest.fixture(scope="module")
def onevision_names(tmp_path_factory):
    """A model and a processor, and frames of a video, as the page about LLaVA-OneVision speaks of them."""
    pair, folder = onevision_twins(), tmp_path_factory.mktemp("video")
    for frame in range(3):
        photo(70, 90, seed=frame).save(folder / f"{frame}.png")
    pair.pruned.config.pruning_config = pair.processor.pruning_config = {}
    return {"model": pair.pruned, "processor": pair.processor, "Image": Image, "Path": Path, "frames": folder}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_block_runs(number, checkpoints, tmp_path, monkeypatch, capsys, request):
    code = BLOCKS[number][1]
    if code in [(ROOT / "examples" / name).read_text(encoding="utf-8") for name in WITH_A_HUB]:
        pytest.skip("needs a Hub; test_docs_hub.py runs it")
    for name, folder in checkpoints.items():
        code = code.replace(f'"{name}"', repr(folder))
    photo(60, 100).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    if is_fragment(code):
        names = request.getfixturevalue("onevision_names" if "videos=" in code else "deep_names")
        code = code.replace('"frames"', repr(str(names.get("frames"))))
        Path("example.py").write_text(code, encoding="utf-8")
        left = runpy.run_path("example.py", init_globals=names)
        assert left.keys() & {"model", "output"}
        return
    Path("example.py").write_text(code, encoding="utf-8")
    runpy.run_path("example.py")
    printed = capsys.readouterr().out
    expected_comment = re.search(r"print\(.*\)  # ([\d ]+)$", code, flags=re.MULTILINE)
    if expected_comment:
        assert expected_comment.group(1).strip() in printed
    left_behind = {path.name for path in Path().iterdir()} - {"example.py", "photo.jpg"}
    assert printed or left_behind
