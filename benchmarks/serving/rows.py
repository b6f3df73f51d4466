"""The results: one row for every variant and number of requests at once, as CSV and as Markdown."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.speed.environment import Environment
from hivtp_hf.files import atomic_write


@dataclass(frozen=True)
class Row:
    """Of one variant at one concurrency.

    Attributes:
        variant, ratio: what was served.
        concurrency: requests at once.
        requests: of each round.
        repeats: rounds.
        prompt_tokens: of a request, on average.
        requests_per_second, slowest, fastest: the median over rounds, and both ends.
        latency: the median over all requests of all rounds, in seconds.
        correct: the share of right answers, or None where no answer is right.
    """

    variant: str
    ratio: float
    concurrency: int
    requests: int
    repeats: int
    prompt_tokens: float
    requests_per_second: float
    slowest: float
    fastest: float
    latency: float
    correct: float | None


def write_results(
    folder: Path, rows: Sequence[Row], environment: Environment, vllm: str, words: str, command: str, note: str
) -> list[Path]:
    """Writes CSV and Markdown, named by the environment; returns their paths. Older files of these names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{environment.stem}_vllm{vllm}"
    paths = [folder / f"{stem}{suffix}" for suffix in (".csv", ".md")]
    where = {**asdict(environment), "vllm": vllm}

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *where], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**_rounded(row), **where} for row in rows)

    atomic_write(paths[0], write_csv)
    atomic_write(
        paths[1], lambda path: path.write_text(_summary(rows, environment, vllm, words, command, note), encoding="utf-8")
    )
    return paths


def _rounded(row: Row) -> dict[str, object]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()}


def _summary(rows: Sequence[Row], environment: Environment, vllm: str, words: str, command: str, note: str) -> str:
    headings = ("variant", "kept", "prompt tokens", "at once", "requests a second", "slowest to fastest", "latency", "right")
    lines = [
        "# Requests a second of vLLM's server",
        "",
        f"{environment.device}; {environment.dtype}, vLLM {vllm} (a build for CPUs), torch {environment.torch}, transformers",
        f"{environment.transformers}, Python {environment.python}; {environment.date}, commit {environment.commit}.",
        f"`{command}`",
        "",
        words,
        "All servers were up at once, and only one was asked at a time, in another random order each round; every image was",
        f"new to its server. Medians of rounds: {rows[0].repeats}, each of at least {rows[0].requests} requests. Definitions",
        "and limits: benchmarks/README.md.",
        *([note] if note else []),
        "",
        _line(headings),
        _line(["---"] * len(headings)),
    ]
    for row in rows:
        ends = f"{row.slowest:.2f} to {row.fastest:.2f}"
        numbers = (
            f"{row.requests_per_second:.2f}",
            ends,
            f"{row.latency * 1000:.0f} ms",
            "-" if row.correct is None else f"{row.correct:.0%}",
        )
        lines.append(_line((row.variant, f"{row.ratio:.3f}", f"{row.prompt_tokens:.0f}", str(row.concurrency), *numbers)))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
