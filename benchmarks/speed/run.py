"""A whole run: settings checked, models built, the parts in turn, results written after each of them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import transformers

from hivtp_hf.checkpoints.placing import checked_device
from hivtp_hf.figures.plotting import can_plot
from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.settings import checked_ratio

from .bench import CLOCKS, Bench, Settings
from .decode import measure_decode
from .dtype_choice import choose_dtype
from .environment import this_environment
from .import_time import measure_import
from .memory import measure_memory
from .models import build_models
from .prefill import measure_prefill
from .presets import PRESETS, Preset
from .processor import measure_processor
from .result_files import write_results
from .rows import Row
from .summary import Report
from .targets import judge
from .throughput import measure_throughput
from .vision import measure_vision
from .weights import measure_weights

PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "vision": measure_vision,
    "prefill": measure_prefill,
    "decode": measure_decode,
    "throughput": measure_throughput,
    "memory": measure_memory,
    "weights": measure_weights,
    "processor": measure_processor,
    "import": measure_import,
}

Given = TypeVar("Given")


def run_benchmark(
    preset: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    methods: Sequence[str] | None = None,
    ratios: Sequence[float] | None = None,
    images: Sequence[tuple[int, int]] | None = None,
    batches: Sequence[int] | None = None,
    new_tokens: Sequence[int] | None = None,
    repeats: int | None = None,
    clock: str = "wall",
    only: Sequence[str] | None = None,
    output: Path = Path("bench_output"),
    commit: str | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> tuple[Report, list[Path]]:
    """Measures, and writes the results into the folder `output`.

    Args:
        preset: a name among `PRESETS`.
        device, dtype: the preset's device and the faster dtype unless given.
        methods, ratios, images, batches, new_tokens: the preset's unless given. The first method and image size lead: they
            stand for the others where those make no difference.
        repeats: timed rounds of each part but "decode" (whose rounds are tokens) and "memory"; each part's own unless given.
        clock: "wall", or "process" for the processor time of this process: on a CPU that others use too. The parts
            "throughput", "processor" and "import" go by the wall clock all the same.
        only: the parts to measure, all unless given.
        output: a folder, made if missing.
        commit: of the code, where git cannot say.
        command: how the run was started, for the summary.
        say: takes progress, line by line.

    Returns:
        The report and the files written.

    Raises:
        ValueError: for settings that are unknown or out of range, and for a device that is missing. Nothing is written then.
    """
    started = time.perf_counter()
    shape = _chosen("--preset", preset, PRESETS)
    settings = _checked_settings(shape, methods, ratios, images, batches, new_tokens, repeats, clock)
    parts = list(PARTS) if only is None else [part for part in PARTS if part in _known("--only", only, PARTS)]
    place = checked_device(device or shape.device, timed=True)
    if clock != "wall" and place.type != "cpu":
        raise ValueError(f"`--clock` is {clock!r}, which tells nothing of {place}. Leave it out, or give `--device cpu`.")
    if place.type == "cuda":
        torch.cuda.set_device(place)

    def progress(line: str) -> None:
        say(f"[{time.perf_counter() - started:6.0f} s] {line}")

    with _for_the_run(shape.threads):
        precision, rows = choose_dtype(dtype, shape, place)
        environment = this_environment(place, precision, preset, commit)
        progress(f"{environment.device}, {environment.dtype}: building {shape.description}")
        bench = Bench(settings, build_models(shape.config(), place, precision), progress)
        if place.type == "cpu":
            absent = torch.cuda.device_count() == 0
            reason = "this machine has no CUDA device that torch can use" if absent else "the run was on the CPU"
            bench.lacks(f"A GPU was not measured: {reason}.")
        # Named where it was chosen, so that runs in several dtypes do not take each other's place.
        of_dtype = "" if dtype == "auto" else f"-{environment.dtype}"
        stem = environment.stem + of_dtype + ("" if only is None else "_" + "-".join(parts))
        if clock != "wall":
            bench.lacks("Times are processor time of the process, all threads together, and not of the wall clock.")
        left_out = [part for part in PARTS if part not in parts]
        if left_out:
            bench.lacks(f"Not measured, as `--only` left them out: {', '.join(left_out)}.")
        for index, part in enumerate(parts):
            progress(f"{part} ...")
            rows = [*rows, *PARTS[part](bench)]
            waiting = [f"The part {later!r} had not run when this was written." for later in parts[index + 1 :]]
            report = Report(environment, shape, rows, judge(rows, shape, place), [*bench.missing, *waiting], command)
            # After every part, so that a run that is cut off leaves what it has.
            paths = write_results(output, stem, report)
    progress("done" if can_plot() else 'done, without a figure: matplotlib is missing, `pip install "hivtp-hf[plots]"`')
    return report, paths


@contextlib.contextmanager
def _for_the_run(threads: int | None) -> Iterator[None]:
    """Switches of the whole process, put back afterwards: transformers' warnings are off, and torch has so many threads."""
    verbosity, threads_before = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads_before)


def _checked_settings(
    preset: Preset,
    methods: Sequence[str] | None,
    ratios: Sequence[float] | None,
    images: Sequence[tuple[int, int]] | None,
    batches: Sequence[int] | None,
    new_tokens: Sequence[int] | None,
    repeats: int | None,
    clock: str,
) -> Settings:
    _chosen("--clock", clock, CLOCKS)
    pruning_methods = {name: method for name, method in METHODS.items() if not method.keeps_everything}
    sizes = _some("--images", preset.images if images is None else images)
    for size in sizes:
        if len(size) != 2:
            raise ValueError(f"`--images` has {size!r}; a size is height x width in pixels.")
        for side in size:
            _positive("--images", side)
    return Settings(
        preset=preset,
        methods=preset.methods if methods is None else tuple(_known("--methods", methods, pruning_methods)),
        ratios=preset.ratios if ratios is None else tuple(checked_ratio(ratio) for ratio in _some("--ratios", ratios)),
        images=tuple((height, width) for height, width in sizes),
        batches=preset.batches if batches is None else _whole("--batches", batches),
        new_tokens=preset.new_tokens if new_tokens is None else _whole("--new-tokens", new_tokens),
        repeats=None if repeats is None else _positive("--repeats", repeats),
        clock=clock,
    )


def _chosen(option: str, name: str, known: dict[str, Given]) -> Given:
    if name not in known:
        raise ValueError(f"`{option}` is {name!r}; it must be one of {', '.join(known)}.")
    return known[name]


def _known(option: str, names: Sequence[str], known: dict[str, Given]) -> Sequence[str]:
    for name in _some(option, names):
        _chosen(option, name, known)
    return list(dict.fromkeys(names))


def _some(option: str, values: Sequence[Given]) -> tuple[Given, ...]:
    if not values:
        raise ValueError(f"`{option}` is empty; give at least one.")
    return tuple(values)


def _whole(option: str, values: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({_positive(option, value) for value in _some(option, values)}))


def _positive(option: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{option}` has {value!r}; it must be a whole number from 1.")
    return value
