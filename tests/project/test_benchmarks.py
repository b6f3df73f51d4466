"""The benchmarks measure what they say: equal prompts, selections and caches, and whole files. No test looks at a time."""

import csv
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from benchmarks.speed import result_files, run, throughput
from benchmarks.speed.batch_search import largest_batch
from benchmarks.speed.bench import Bench, Settings
from benchmarks.speed.command import main
from benchmarks.speed.flops import count_flops
from benchmarks.speed.images import TEXT_TOKENS, random_images
from benchmarks.speed.import_time import LOADING
from benchmarks.speed.interleaving import interleave
from benchmarks.speed.models import Models, build_models
from benchmarks.speed.peak_memory import peak_memory
from benchmarks.speed.presets import PRESETS
from benchmarks.speed.published_way import published_features
from benchmarks.speed.rows import Row, compared, measured
from benchmarks.speed.run import PARTS, run_benchmark
from benchmarks.speed.sections import LANGUAGE_MODEL, SCORING, SELECTION, TOWER, VISION, WEIGHING, watched
from benchmarks.speed.spread import median_interval, spread
from benchmarks.speed.stopwatch import TOTAL, Stopwatch
from benchmarks.speed.targets import MET, MISSED, NOT_JUDGED, NOT_MEASURED, judge
from benchmarks.speed.variants import (
    Variant,
    cache_bytes,
    first_token,
    limit_of,
    model_inputs,
    model_of,
    ours_variant,
    published_of,
    stock_variant,
    weighted_of,
)
from hivtp_hf.checkpoints.language_model_cost import kv_cache_bytes
from hivtp_hf.pruning.attention_scores import received_attention
from hivtp_hf.pruning.registry import METHODS
from nightly import mostly_nightly

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
TINY = PRESETS["tiny"]
SIZES = ((672, 672), (480, 640), (100, 1000))
RATIOS = (1 / 2, 2 / 9, 1 / 9, 1.0)
# Of stages inside the language model benchmarks/stages.py says what the limit is.
METHOD_NAMES = [name for name, method in METHODS.items() if not method.keeps_everything and not method.counts_newlines]
WITH_MAPS = ("hivtp", "hiprune", "cls_attention")


@pytest.fixture(scope="module")
def models() -> Models:
    return build_models(TINY.config(), CPU, torch.float32)


# The part "import" starts a dozen interpreters.
QUICK_PARTS = [part for part in PARTS if part != "import"]


@pytest.fixture(scope="module", params=mostly_nightly((None, QUICK_PARTS), bool), ids=["whole", "without import"])
def tiny_run(request, tmp_path_factory):
    """A run of the smallest preset: its report, its files, what it said, and its parts, or None for a whole one."""
    folder, said = tmp_path_factory.mktemp("bench") / "new", []
    given = {"only": request.param, "commit": "abc1234", "command": "the command"}
    report, paths = run_benchmark("tiny", repeats=1, output=folder, say=said.append, **given)
    assert sorted(folder.iterdir()) == sorted(paths)  # nothing half-written beside them
    return report, paths, said, request.param


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


EXPECTED = {
    "vision": {"tower", "vision pass", "scoring", "selection", "scoring and selection", "tower over stock"}
    | {"tower with scoring and selection", "tower over published way", "stock's tower plus own work over stock's tower"},
    "prefill": {"time to first token", "vision pass", "language model prefill", "KV cache", "time to first token over stock"}
    | {"time to first token over limit", "KV cache over limit", "limit plus own work over limit"},
    "decode": {"decode per token", "decode per token over limit"},
    "throughput": {"throughput", "throughput over stock", "throughput over limit"},
    "memory": {"peak memory of the vision pass", "extra peak memory over stock's vision pass", "peak memory to the first token"}
    | {"peak memory of scoring and selection alone", "FLOPs to the first token"},
    "weights": {"time to first token", "language model prefill", "weighing", "KV cache", "decode per token"}
    | {"peak memory to the first token", "peak memory of weighing alone"}
    | {
        f"{quantity} over the same without weights"
        for quantity in (
            *("time to first token", "language model prefill", "without weights plus own work", "KV cache"),
            *("decode per token", "peak memory to the first token"),
        )
    },
    "processor": {"preprocessing", "counting placeholders", "added counting over stock's preprocessing"}
    | {"preprocessing over stock"},
    "import": {"import of what hivtp_hf needs", "import of hivtp_hf after what it needs", "import of hivtp_hf alone"}
    | {"import of hivtp_hf alone over what it needs", "loading, stock", "loading, remote code", LOADING},
}


def test_a_run_leaves_every_quantity_and_says_what_is_missing(tiny_run):
    _, paths, said, parts = tiny_run
    assert [path.suffix for path in paths] == [".csv", ".md", ".png"]
    assert {path.stem for path in paths} == {paths[0].stem}
    assert paths[0].stem.endswith("_tiny" + ("_" + "-".join(parts) if parts else ""))
    rows = rows_of(paths[0])
    assert {part: {row["quantity"] for row in rows if row["part"] == part} for part in parts or PARTS} == {
        part: EXPECTED[part] for part in parts or PARTS
    }
    for row in rows:
        numbers = [float(row[name]) for name in ("min", "q25", "median", "q75", "max")]
        assert all(map(math.isfinite, numbers))
        assert numbers == sorted(numbers)
        assert (row["preset"], row["commit"]) == ("tiny", "abc1234")
        names = ("date", "device", "cpu", "cores", "threads", "dtype", "torch", "transformers", "python", "unit", "repeats")
        assert all(row[name] for name in names)
    of_ttft = [row for row in rows if row["quantity"] == "time to first token over limit" and row["variant"] == "ours"]
    found = {(row["method"], row["image"], round(float(row["ratio"]), 4)) for row in of_ttft}
    assert found == set(itertools.product(TINY.methods, ("672 x 672", "480 x 640"), (0.5, 0.2222, 0.1111)))
    assert {row["variant"] for row in rows} == {"", "stock", "limit", "ours", "weighted", "published"}
    assert any("GPU was not measured" in line for line in said)
    page = paths[1].read_text()
    for text in ("the command", "abc1234", "## Targets", "published, not measured here", "## Not measured", "A GPU was not"):
        assert text in page
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_what_does_not_depend_on_time_holds_in_the_run(tiny_run):
    report = tiny_run[0]
    verdicts = {judgement.target.name: judgement.verdict for judgement in report.judgements}
    assert verdicts["KV cache / limit"] == MET
    assert verdicts["extra peak memory over stock's vision pass"] == MET
    assert verdicts["time to first token / limit"].startswith(NOT_JUDGED)
    flops = {(row.variant, row.ratio): row.median for row in report.rows if row.quantity == "FLOPs to the first token"}
    assert flops["limit", 1 / 9] < flops["limit", 1 / 2] < flops["stock", 1.0]
    # Ours has as many as its limit, but for the scoring and for the tower's last layer, which it leaves out.
    assert len({round(flops["ours", ratio] - flops["limit", ratio]) for ratio in TINY.ratios}) == 1


def test_part_of_a_run_says_so_in_its_name_and_its_page(tmp_path, monkeypatch):
    for module in (result_files, run):
        monkeypatch.setattr(module, "can_plot", lambda: False)
    said: list[str] = []
    quick = {"dtype": "bfloat16", "only": ["decode"], "new_tokens": [2], "output": tmp_path, "say": said.append}
    _, paths = run_benchmark("tiny", **quick)
    assert [path.suffix for path in paths] == [".csv", ".md"]
    assert "matplotlib is missing" in said[-1]
    assert paths[0].stem.endswith("_tiny-bfloat16_decode")
    assert {row["part"] for row in rows_of(paths[0])} == {"decode"}
    page = paths[1].read_text()
    assert "`--only` left them out: vision, prefill, throughput, memory, weights, processor, import." in page
    assert "| time to first token / limit | at most 1.030 | - | - | - | not measured |" in page


def test_models_share_every_tensor(models):
    stock = {name: tensor.data_ptr() for name, tensor in models.stock.named_parameters()}
    for twin in (models.pruned, models.published):
        assert {name: tensor.data_ptr() for name, tensor in twin.named_parameters()} == stock
        assert not any(buffer.is_meta for buffer in twin.buffers())
    assert models.published.model.vision_tower.config._attn_implementation == "eager"
    assert models.stock.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_limit_is_as_long_as_ours_and_its_cache_as_large(models, method):
    for size, ratio in itertools.product(SIZES, RATIOS):
        images = random_images(models.config, size, 1, CPU, torch.float32)
        ours = ours_variant(models, size, method, ratio)
        limit = limit_of(ours)
        kept = model_of(models, ours).get_image_features(images.pixel_values, images.image_sizes).kept_indices[0]
        assert ours.image_tokens == limit.image_tokens == len(kept)
        of_ours, of_limit = model_inputs(models, images, ours), model_inputs(models, images, limit)
        assert of_ours["input_ids"].shape == of_limit["inputs_embeds"].shape[:2] == (1, len(kept) + TEXT_TOKENS)
        measured_bytes = cache_bytes(first_token(models, images, ours).cache)
        assert measured_bytes == cache_bytes(first_token(models, images, limit).cache)
        assert measured_bytes == kv_cache_bytes(models.config.text_config, len(kept) + TEXT_TOKENS, torch.float32)


def test_the_limit_at_stocks_own_length_is_stock(models):
    images = random_images(models.config, SIZES[1], 2, CPU, torch.float32)
    stock = stock_variant(models, SIZES[1])
    logits = []
    for variant in (stock, Variant("limit", stock.image_tokens)):
        with torch.no_grad():
            logits.append(model_of(models, variant)(**model_inputs(models, images, variant)).logits)
    torch.testing.assert_close(logits[0], logits[1])
    assert first_token(models, images, stock).ids == logits[1][:, -1].argmax(-1).tolist()


def test_the_weighted_variant_keeps_the_same_tokens_and_has_weights_and_places(models):
    images = random_images(models.config, SIZES[1], 1, CPU, torch.float32)
    ours = ours_variant(models, SIZES[1], "hivtp", 2 / 9)
    found = []
    for variant in (ours, weighted_of(ours)):
        encoded = model_of(models, variant).get_image_features(images.pixel_values, images.image_sizes)
        with torch.no_grad():
            output = model_of(models, variant)(**model_inputs(models, images, variant))
        found.append((encoded.kept_indices[0], encoded.log_weights, output.logits[0, -1]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is None
    assert found[1][1][0].any()
    assert not torch.allclose(found[0][2], found[1][2])
    first = [first_token(models, images, variant) for variant in (ours, weighted_of(ours))]
    assert cache_bytes(first[0].cache) == cache_bytes(first[1].cache)


@pytest.mark.parametrize("method", WITH_MAPS)
def test_the_published_way_keeps_the_same_cells(models, method):
    for size, ratio in itertools.product(SIZES, RATIOS[:3]):
        images = random_images(models.config, size, 2, CPU, torch.float32)
        ours = ours_variant(models, size, method, ratio)
        with torch.no_grad():
            expected = model_of(models, ours).get_image_features(images.pixel_values, images.image_sizes)
            features, kept = published_features(models.published, images, method, ratio)
        for ours_kept, theirs in zip(expected.kept_indices, kept, strict=True):
            assert torch.equal(ours_kept, theirs)
        torch.testing.assert_close(features, expected.pooler_output)
        first = [first_token(models, images, variant).ids for variant in (ours, published_of(ours))]
        assert first[0] == first[1]


def test_the_stopwatch_sees_each_section_of_the_variants_that_have_it(models):
    images = random_images(models.config, SIZES[0], 1, CPU, torch.float32)
    ours = ours_variant(models, SIZES[0], "hivtp", 0.5)
    stopwatch, seen = Stopwatch(CPU), {}
    with watched(models, stopwatch):
        variants = stock_variant(models, SIZES[0]), limit_of(ours), ours, weighted_of(ours), published_of(ours)
        for variant in variants:
            seen[variant.kind] = stopwatch.run(lambda chosen=variant: first_token(models, images, chosen))[1]
    everywhere = {TOTAL, VISION, TOWER, LANGUAGE_MODEL}
    assert seen["stock"].keys() == seen["limit"].keys() == everywhere
    assert seen["ours"].keys() == seen["published"].keys() == everywhere | {SCORING, SELECTION}
    assert seen["weighted"].keys() == seen["ours"].keys() | {WEIGHING}
    assert stopwatch.run(lambda: first_token(models, images, ours))[1].keys() == {TOTAL}


def test_peak_memory_is_that_of_the_tensors_that_lived_together():
    def run():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        second, third = torch.empty(500, dtype=torch.float32), torch.empty(2000, dtype=torch.float32)
        return second.numel() + third.numel()

    assert peak_memory(CPU, run) == 4 * 2500
    with pytest.raises(RuntimeError, match="no allocation"):
        peak_memory(CPU, lambda: None)


def test_flops_are_those_of_products_attention_and_scoring():
    query = torch.randn(2, 4, 10, 8)
    assert count_flops(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7
    attention = 2 * 2 * 4 * 10 * 10 * 8
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == 2 * attention
    assert count_flops(lambda: received_attention(query, query, 1.0, 4)) == attention
    assert count_flops(lambda: received_attention(query[:, :, :1], query, 1.0, 4)) == attention // 10


def test_the_largest_batch_is_found_within_its_precision():
    for start, largest in itertools.product((1, 4), range(100)):
        asked = []

        def fits(batch, largest=largest, asked=asked):
            asked.append(batch)
            return batch <= largest

        found = largest_batch(fits, start=start, precision=8)
        assert found <= largest
        assert largest < start or largest <= found + max(1, found // 8)
        assert len(asked) <= 2 + 2 * math.log2(2 * max(1, largest))


def test_intervals_hold_the_median_as_often_as_they_say():
    assert median_interval([5.0]) == (5.0, 5.0, 0.0)
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0, 0.75)
    for n in range(2, 14):
        low, high, coverage = median_interval([float(value) for value in range(n)])
        # Each value lies below the true median or above, with equal chances: of all ways, those with the median inside.
        below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        inside = sum(low < count <= high for count in below)
        assert coverage == pytest.approx(inside / 2**n)
        assert coverage >= 0.95 or (low, high) == (0, n - 1)
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0, 1.0, 5.0, 5)


def test_variants_take_turns_in_another_order_each_round():
    calls = []
    runs = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "abcd"}
    results = interleave(runs, 6, warm_up="ac")
    assert calls[:2] == ["a", "c"]
    rounds = ["".join(calls[start : start + 4]) for start in range(2, len(calls), 4)]
    assert len(rounds) == 6
    assert {"".join(sorted(order)) for order in rounds} == {"abcd"}
    assert len(set(rounds)) > 1
    # The i-th result of every name is of the i-th round.
    assert all(2 + 4 * i < results[name][i] <= 6 + 4 * i for name in "abcd" for i in range(6))


def over_limit(*values: float, method: str = "hivtp") -> Row:
    variant = Variant("ours", 10, method, 0.5)
    return compared("prefill", "time to first token over limit", list(values), [1.0] * len(values), variant)


def test_targets_are_judged_by_the_row_that_is_furthest_away():
    def judgement(rows, name="time to first token / limit", preset="cpu", device=CPU):
        return next(found for found in judge(rows, PRESETS[preset], device) if found.target.name == name)

    assert judgement([]).verdict == NOT_MEASURED
    assert judgement([over_limit(1.02), over_limit(1.01)]).verdict == MET
    missed = judgement([over_limit(1.02), over_limit(1.04), over_limit(0.9)])
    assert (missed.verdict, missed.worst.median, missed.kept, missed.rows) == (MISSED, 1.04, 2, 3)
    assert missed.is_settled
    assert not judgement([over_limit(1.0, 1.01, 1.2)]).is_settled
    # The published way is not bound; gprune has a bound of its own; targets of one device are not judged on another.
    published = dataclasses.replace(over_limit(2.0), variant="published")
    assert judgement([over_limit(1.02), published, over_limit(1.09, method="gprune")]).verdict == MET
    assert judgement([over_limit(1.2)], preset="tiny").verdict.startswith(NOT_JUDGED)
    tower = measured("vision", "tower over stock", "ratio", [1.5], Variant("ours", 9, "hivtp", 0.5))
    name = "tower with scoring and selection / stock's tower"
    assert judgement([tower], name).verdict == MISSED
    assert judgement([tower], name, device=torch.device("cuda")).verdict == f"{NOT_JUDGED}: for a CPU"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "8b"}, "`--preset` is '8b'; it must be one of 7b"),
        ({"device": "meta"}, "`--device` is 'meta'"),
        ({"dtype": "int8"}, "`--dtype` is 'int8'; it must be one of auto, float32"),
        ({"methods": ["none"]}, "`--methods` is 'none'"),
        ({"ratios": [1.5]}, "retention_ratio"),
        ({"images": [(0, 672)]}, "`--images` has 0"),
        ({"batches": []}, "`--batches` is empty"),
        ({"new_tokens": [2.5]}, "`--new-tokens` has 2.5"),
        ({"clock": "sand"}, "`--clock` is 'sand'; it must be one of wall, process"),
        ({"only": ["visoin"]}, "`--only` is 'visoin'; it must be one of vision, prefill"),
    ],
)
def test_wrong_arguments_are_errors_that_leave_nothing(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(**{"preset": "tiny", "output": tmp_path / "new", "say": lambda line: None, **wrong})
    assert not list(tmp_path.iterdir())


def test_processor_time_is_for_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "checked_device", lambda device, timed: torch.device("cuda"))
    with pytest.raises(ValueError, match="`--clock` is 'process', which tells nothing of cuda"):
        run_benchmark("tiny", clock="process", output=tmp_path, say=lambda line: None)


def test_the_command_prints_its_targets_and_files(tmp_path, run_main):
    asked = ["--preset", "tiny", "--only", "processor", "--only", "decode", "--new-tokens", "2", "--repeats", "1"]
    ended = run_main(
        main, *asked, "--methods", "uniform,random", "--ratios", "1/3,0.1", "--images", "96x160", "--output", tmp_path
    )
    assert ended.returncode == 0
    assert "KV cache" in ended.stdout
    assert all(str(path) in ended.stdout for path in tmp_path.iterdir())
    page = next(tmp_path.glob("*.md")).read_text()
    assert "`python -m benchmarks.speed --preset tiny --only processor" in page
    rows = rows_of(next(tmp_path.glob("*.csv")))
    assert {row["image"] for row in rows} - {""} == {"96 x 160"}
    of_ours = {(row["method"], round(float(row["ratio"]), 4)) for row in rows if row["variant"] == "ours"}
    assert of_ours == {("uniform", 0.3333), ("uniform", 0.1)}  # the first method leads


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ratios", "half"], "'half' is no ratio"),
        (["--images", "672"], "`--images` is '672'; it must be HEIGHTxWIDTH"),
        (["--device", "cuda"], "sees 0 CUDA devices"),
    ],
)
def test_the_command_explains_what_it_cannot_do(tmp_path, monkeypatch, run_main, arguments, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ended = run_main(main, "--preset", "tiny", *arguments, "--output", tmp_path / "new")
    assert ended.returncode == 1
    assert said in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_left_out_and_said(models, monkeypatch):
    settings = Settings(TINY, ("hivtp",), (0.5,), ((672, 672),), (1, 2), (2,), 1)
    said: list[str] = []
    bench = Bench(settings, models, said.append)
    whole = throughput._generate

    def short_of_memory(bench, images, variant, new_tokens):
        if variant.kind == "stock" and images.batch > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(bench, images, variant, new_tokens)

    monkeypatch.setattr(throughput, "_generate", short_of_memory)
    rows = throughput.measure_throughput(bench)
    found = {(row.variant, row.batch) for row in rows if row.quantity == "throughput"}
    assert found == {("stock", 1), ("limit", 1), ("limit", 2), ("ours", 1), ("ours", 2)}
    assert any("stock" in sentence and "batch 2" in sentence for sentence in bench.missing)
