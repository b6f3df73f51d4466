"""examples/demo.py: what it prints is what the layout counts, for its own tiny model and for a user's."""

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image

from checkpoints import GEOMETRY, build_pruned_checkpoint
from examples import demo
from hivtp_hf import TokenLayout, VisualTokenPruningConfig
from hivtp_hf.families.llava_onevision_layout import llava_onevision_layout, llava_onevision_video_layout
from hivtp_hf.pruning.registry import METHODS
from tiny_checkpoint import build_stock_checkpoint
from tiny_models import photo
from tiny_onevision import SMALL

pytestmark = pytest.mark.once

SIDES = tuple((58 * rows, 58 * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


@pytest.fixture(autouse=True)
def _verbosity():
    """The demo silences transformers for its own process; other tests share this one."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return build_pruned_checkpoint(tmp_path_factory.mktemp("demo"), {"retention_ratio": 0.25})


@pytest.fixture
def image_path(tmp_path) -> Path:
    path = tmp_path / "holiday.png"
    photo(90, 130).save(path)
    return path


def layout(height: int, width: int, **pruning) -> TokenLayout:
    settings = VisualTokenPruningConfig(**pruning)
    return TokenLayout.from_image_size(height, width, settings, pinpoints=PINPOINTS, **GEOMETRY)


def rows_of(name: str, output: str) -> list[list[str]]:
    """The words of the rows of a photograph, table by table."""
    return [line.split() for line in output.splitlines() if line.startswith(name)]


def row_of(name: str, output: str) -> list[str]:
    """The words of the one row of a photograph."""
    (row,) = rows_of(name, output)
    return row


def test_tiny_model_on_a_photograph(tmp_path, run_main, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("chelsea",))
    monkeypatch.setattr(demo, "TINY_MODEL", GEOMETRY)
    monkeypatch.setattr(demo, "TINY_ONEVISION", SMALL)
    output = run_main(demo.main, "--output", tmp_path, "--repeats", 1).stdout
    expected, (of_llava, of_qwen, of_onevision) = layout(300, 451), rows_of("chelsea", output)
    assert of_llava[:4] == ["chelsea", "451x300", str(expected.num_stock), str(expected.num_retained)]
    # Of 11 x 16 cells a quarter of each quadrant (5 or 6 rows of 8), rounded down, and one of each of 6 x 8 windows.
    assert of_qwen[:4] == ["chelsea", "451x300", "176", str(sum([5 * 8 // 4] * 2 + [6 * 8 // 4] * 2) + 6 * 8)]
    assert (tmp_path / "qwen_chelsea_methods.png").exists()
    whole, pruned = (
        llava_onevision_layout(300, 451, True, VisualTokenPruningConfig(**pruning), 58, 7, SIDES, "anyres_max_4")
        for pruning in ({"method": "none"}, {})
    )
    assert of_onevision[:4] == ["chelsea", "451x300", str(whole.num_stock), str(pruned.num_retained)]
    video = llava_onevision_video_layout(6, VisualTokenPruningConfig(retention_ratio=2 / 9), 8, 58, 7)
    assert f"Of 97 tokens of 6 frames {video.num_retained} are kept, chosen in every frame" in output
    for scope in ("frame", "video"):
        assert Image.open(tmp_path / f"onevision_frames_kept_by_{scope}.png").width > 6 * 320
    assert "nonsense" in output
    assert Image.open(tmp_path / "chelsea_kept.png").format == "PNG"
    assert Image.open(tmp_path / "chelsea_methods.png").width > 300 * len(METHODS)
    assert json.loads((tmp_path / "pruned_checkpoint" / "config.json").read_text())["model_type"] == "hivtp_llava_next"


@pytest.mark.parametrize(("kind", "pruning"), [("pruned", {"retention_ratio": 0.25}), ("stock_source", {})])
def test_own_checkpoint_and_image(kind, pruning, checkpoint, image_path, tmp_path, run_main):
    folder = checkpoint.parent / kind
    output = run_main(demo.main, folder, image_path, "Is there a dog?", "--output", tmp_path / "out", "--repeats", 1).stdout
    expected = layout(90, 130, **pruning)
    assert row_of("holiday", output)[:4] == ["holiday", "130x90", str(expected.num_stock), str(expected.num_retained)]
    assert "Is there a dog?" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["holiday_kept.png", "holiday_methods.png"]


def test_llava_without_a_class_token(image_path, tmp_path, run_main):
    folder = build_stock_checkpoint(tmp_path / "llava", family="llava", vision_type="siglip_vision_model", **GEOMETRY)
    output = run_main(demo.main, folder, image_path, "--output", tmp_path / "out", "--repeats", 1).stdout
    assert row_of("holiday", output)[:4] == ["holiday", "130x90", "64", "32"]
    assert "cls_attention is left out" in output


def test_cache_bytes_are_those_of_the_prompt(checkpoint):
    messages = [{"role": "user", "content": [{"type": "image", "image": photo(90, 130)}, {"type": "text", "text": "?"}]}]
    _, pipe = demo.load_pair(str(checkpoint), str(checkpoint))
    (prefill,) = demo.measure([pipe], messages, repeats=1)
    tokens = demo.prepare(pipe, messages)["input_ids"].shape[1]
    assert prefill.cache_bytes == tokens * 2 * 3 * 32 * 4  # keys and values, of 3 layers with one head of 32 float32
    assert prefill.image_tokens == layout(90, 130, retention_ratio=0.25).num_retained


def test_errors_are_one_clear_message(checkpoint, image_path, tmp_path, run_main):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for arguments, named in (((checkpoint, tmp_path / "missing.png"), "missing.png"), ((tmp_path, image_path), "'bert'")):
        ended = run_main(demo.main, *arguments, "--output", tmp_path / "out")
        assert ended.returncode == 1
        assert named in ended.stderr.splitlines()[-1]
