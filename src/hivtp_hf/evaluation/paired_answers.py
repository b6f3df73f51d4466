"""What one method answers and another does not, on the same questions of finished runs: `compared`.

Questions are paired, and p is that of McNemar's exact test, two-sided: the chance of a split at least as uneven among the
questions that only one of the two answers. It is not corrected for the number of tests. Of "random" the first seed is compared,
since draws for one question are not independent.
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import atomic_write, read_json
from .data import ALL
from .run_folder import CONFIG, PARTS, PREDICTIONS
from .variants import BASE_ONLY, DOWNSAMPLE, PUBLISHED, SEEDS, UNPRUNED, WEIGHTS_AND_POSITIONS

# What a comparison calls all questions that are not of the type that was asked for.
OTHERS = "others"
# These have one share of tokens, whatever ratio was asked for.
_OF_ONE_RATIO = (UNPRUNED, BASE_ONLY)
_NEEDED = ("row", "image", "question", "answer", "method", "ratio", "seed", "correct")


class Side(NamedTuple):
    """A method, and which of `WEIGHTS_AND_POSITIONS` it ran with. Written "hivtp:both", and "hivtp" for the published way."""

    method: str
    told: str

    def __str__(self) -> str:
        return self.method if self.told == PUBLISHED else f"{self.method}:{self.told}"


class Comparison(NamedTuple):
    """Two methods at one ratio, on the questions of one type.

    Attributes:
        asked_ratio: at which they are compared.
        method: as `Side` is written.
        ratio: of it, as predictions.csv has it.
        tokens: of a question's image that a layer of the language model sees, on average.
        against, against_ratio, against_tokens: of the other one.
        question_type: "all" for all questions, "others" for those that are not of the type that was asked for.
        n: how many questions.
        right, against_right: how many the two answer.
        won, lost: how many only the first one answers, and only the other one.
        p: of McNemar's exact test.
    """

    asked_ratio: str
    method: str
    ratio: str
    tokens: float
    against: str
    against_ratio: str
    against_tokens: float
    question_type: str
    n: int
    right: int
    against_right: int
    won: int
    lost: int
    p: float


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p of so many against so many, where each is as likely: 1 where there are none."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n)


@dataclass
class _Answers:
    """Of one side at one ratio: the ratio as it is shown, and by row whether the answer is right, and tokens."""

    ratio: str
    right: dict[str, bool] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)


class PairedRun:
    """A finished run, side by side.

    Args:
        folder: of `hivtp evaluate`.

    Attributes:
        questions: by row, the image, the question and the answer.
        types: by row.
        sides: by side and by the ratio that was asked for.

    Raises:
        ValueError: for what is no finished run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.questions: dict[str, tuple[str, ...]] = {}
        self.types: dict[str, str] = {}
        self.sides: dict[Side, dict[str, _Answers]] = {}
        lines = _predictions(folder)
        asked = {} if "asked_ratio" in lines[0] else _asked_of_smaller_images(folder, lines)
        for line in lines:
            if line["seed"] in ("", str(SEEDS[0])):
                self._add(line, asked)

    def _add(self, line: Mapping[str, str], asked: Mapping[str, str]) -> None:
        row = line["row"]
        self.questions[row] = line["image"], line["question"], line["answer"]
        self.types[row] = line.get("question_type", "")
        ratios = self.sides.setdefault(Side(line["method"], line.get("weights_and_positions", PUBLISHED)), {})
        ratio = line["ratio"]
        of_earlier_releases = asked.get(ratio, ratio) if line["method"] == DOWNSAMPLE else ratio
        answers = ratios.setdefault(line.get("asked_ratio") or of_earlier_releases, _Answers(ratio))
        answers.right[row] = line["correct"] == "1"
        per_layer = line.get("tokens_per_layer")
        tokens = float(per_layer) if per_layer else sum(float(line.get(f"{kind}_tokens", 0)) for kind in ("patch", "newline"))
        answers.tokens[row] = tokens

    def side(self, text: str) -> Side:
        """The side that a text such as "hivtp" or "hivtp:both" means.

        A method alone means the published way if the run has that, else the only one that it has.

        Raises:
            ValueError: for a method and a way that the run has not.
        """
        method, colon, told = text.strip().partition(":")
        ways = [side.told for side in self.sides if side.method == method]
        if not ways:
            known = ", ".join(dict.fromkeys(side.method for side in self.sides))
            raise ValueError(f"{text!r}: {self.folder} has no method {method!r}; give one of {known}.")
        if not colon:
            told = PUBLISHED if PUBLISHED in ways or len(ways) > 1 else ways[0]
        if told not in ways:
            ways_text = ", ".join(f"{method}:{way}" for way in ways)
            raise ValueError(
                f"{text!r}: {self.folder} has no {method}:{told}; give one of {ways_text}, where the word behind the colon is "
                f"of `--weights-and-positions` ({', '.join(WEIGHTS_AND_POSITIONS)})."
            )
        return Side(method, told)


def compared(
    run: Path,
    method: str | None = None,
    against: Sequence[str] = (),
    *,
    other_run: Path | None = None,
    question_type: str | None = None,
    say: Callable[[str], object] = print,
) -> list[Comparison]:
    """What a method of a finished run wins and loses against others, by ratio and type of question.

    "none" and "base-only" have one share of tokens and are compared at every ratio of the other method. All else is compared
    at the ratios that both were asked for, "downsample" too, whose share of tokens is the nearest below.

    Args:
        run: its folder.
        method: such as "hivtp", or "hivtp:both" for one of several ways of `--weights-and-positions`. None compares every way
            of every method with the published one.
        against: other methods, written alike.
        other_run: a run that the others are of; of `run` itself by default. It must have been asked the questions of `run`, and
            may have been asked more of them.
        question_type: shows the questions of this type, and all others together, rather than every type by itself.
        say: told at which ratios two methods cannot be compared.

    Raises:
        ValueError: for what is no finished run, a method that is not in it, and where there is nothing to compare.
    """
    ours = PairedRun(run)
    theirs = ours if other_run is None else _with_the_same_questions(PairedRun(other_run), ours)
    if method is not None and not against:
        raise ValueError(f"{method!r} is to be compared with nothing. Name another method behind it, or leave out both.")
    if method is None:
        ways = [(side, Side(side.method, PUBLISHED)) for side in ours.sides if side.told != PUBLISHED]
        sides = [(one, other) for one, other in ways if other in theirs.sides]
        lacking = ", ".join(str(one) for one, other in ways if other not in theirs.sides)
        if sides and lacking:
            say(f"Not compared: {lacking}, of which {theirs.folder} has no published way.")
        if not sides:
            raise ValueError(
                f"{run} has nothing to compare: no method has several ways. Name two methods, or give a run of `hivtp evaluate "
                "--weights-and-positions published,both`, for example."
            )
    else:
        sides = [(ours.side(method), theirs.side(other)) for other in against]
    kinds = _kinds(ours, question_type)
    found: list[Comparison] = []
    for one, other in sides:
        if one == other and theirs is ours:
            raise ValueError(f"{one} is to be compared with itself. Name another method, or give `--other-run`.")
        has, other_has = ours.sides[one], theirs.sides[other]
        pairs = _pairs(one, has, other, other_has)
        if not pairs:
            raise ValueError(
                f"{one} was asked for the ratios {', '.join(has)} and {other} for {', '.join(other_has)}, none of which is the "
                "same. Give runs with a ratio in common."
            )
        if has.keys() != other_has.keys() and not {one.method, other.method} & {*_OF_ONE_RATIO}:
            alone = [f"{one} at {ratio}" for ratio in has if ratio not in other_has]
            alone += [f"{other} at {ratio}" for ratio in other_has if ratio not in has]
            say(f"Not compared, as only one of the two has it: {', '.join(alone)}.")
        for asked, answers, other_answers in pairs:
            for kind, rows in kinds.items():
                found.append(_comparison(asked, one, answers, other, other_answers, kind, rows))
    return found


def write_comparisons(path: Path, comparisons: Iterable[Comparison], *, force: bool = False) -> None:
    """Writes a table as CSV, a line for each comparison.

    Raises:
        ValueError: where something is there already, unless `force` and it is a file; and where there is no such folder.
    """
    check_target(path, force)

    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(Comparison._fields)
            writer.writerows([_shown(name, value) for name, value in one._asdict().items()] for one in comparisons)

    atomic_write(path, write)


def check_target(path: Path, force: bool) -> None:
    """A ValueError where a table cannot be written at `path`, or would replace what is to stay."""
    if not path.parent.is_dir():
        raise ValueError(f"`--output` is {path}, but {path.parent} is no folder; give a file in one that exists.")
    if path.exists() and (path.is_dir() or not force):
        advice = "give another `--output`" + ("" if path.is_dir() else ", or `--force` to replace it")
        raise ValueError(f"{path} exists already; {advice}.")


def _shown(name: str, value: Any) -> Any:
    return f"{value:.2g}" if name == "p" else f"{value:.6g}" if isinstance(value, float) else value


def _predictions(folder: Path) -> list[dict[str, str]]:
    path = folder / PREDICTIONS
    if (folder / PARTS).exists():
        raise ValueError(f"{folder} is a run that has not finished. Let the same `hivtp evaluate` go on, then compare.")
    if not path.is_file():
        raise ValueError(f"{folder} is no finished run of `hivtp evaluate`: it has no {PREDICTIONS}. Give the folder of one.")
    with path.open(newline="", encoding="utf-8") as table:
        reader = csv.DictReader(table)
        lines = list(reader)
    missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
    if missing or not lines:
        lacking = f"the columns {', '.join(missing)}" if missing else "any answer"
        raise ValueError(f"{path} lacks {lacking}. Give the folder of a run of `hivtp evaluate`.")
    return lines


def _asked_of_smaller_images(folder: Path, lines: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What "downsample" was asked for, by the ratio that was measured, in runs of earlier releases, which name that alone.

    Nothing where it cannot be told: two ratios may have meant the same smaller tile, which then ran once.
    """
    if not (folder / CONFIG).is_file():
        return {}
    asked = [f"{ratio:.6g}" for ratio in read_json(folder / CONFIG)["ratios"] if ratio < 1]
    measured = sorted({line["ratio"] for line in lines if line["method"] == DOWNSAMPLE}, key=float, reverse=True)
    return dict(zip(measured, asked, strict=True)) if len(measured) == len(asked) else {}


def _with_the_same_questions(other: PairedRun, run: PairedRun) -> PairedRun:
    """The other run; a ValueError where it lacks a question, or was asked something else under its number."""
    for row, asked in run.questions.items():
        if other.questions.get(row) != asked:
            there = other.questions.get(row)
            instead = "nothing" if there is None else f"{there[1]!r} about {there[0]!r}"
            raise ValueError(
                f"the two runs were not asked the same questions: row {row} is {asked[1]!r} about {asked[0]!r} in {run.folder} "
                f"and {instead} in {other.folder}. As `--other-run`, give a run on the same questions, or more."
            )
    return other


def _kinds(run: PairedRun, question_type: str | None) -> dict[str, list[str]]:
    """The rows of all questions, and of each type."""
    types = list(dict.fromkeys(kind for kind in run.types.values() if kind))
    kinds = {ALL: list(run.types)}
    if question_type is None:
        return {**kinds, **{kind: [row for row in run.types if run.types[row] == kind] for kind in types}}
    if question_type not in types:
        raise ValueError(
            f"`--type` is {question_type!r}; {run.folder} has questions of the types: {', '.join(types) or 'none'}."
        )
    kinds[question_type] = [row for row in run.types if run.types[row] == question_type]
    others = [row for row in run.types if run.types[row] != question_type]
    return {**kinds, OTHERS: others} if others else kinds


def _pairs(
    one: Side, answers: Mapping[str, _Answers], other: Side, other_answers: Mapping[str, _Answers]
) -> list[tuple[str, _Answers, _Answers]]:
    """The ratios that both sides have, and their answers."""
    if other.method in _OF_ONE_RATIO:
        (only,) = other_answers.values()
        return [(asked, of_ratio, only) for asked, of_ratio in answers.items()]
    if one.method in _OF_ONE_RATIO:
        (only,) = answers.values()
        return [(asked, only, of_ratio) for asked, of_ratio in other_answers.items()]
    return [(asked, answers[asked], other_answers[asked]) for asked in answers if asked in other_answers]


def _comparison(
    asked: str, one: Side, answers: _Answers, other: Side, other_answers: _Answers, kind: str, rows: Sequence[str]
) -> Comparison:
    pairs = [(answers.right[row], other_answers.right[row]) for row in rows]
    won, lost, both = (pairs.count(outcome) for outcome in ((True, False), (False, True), (True, True)))
    tokens, other_tokens = (statistics.fmean(of.tokens[row] for row in rows) for of in (answers, other_answers))
    named = asked, str(one), answers.ratio, tokens, str(other), other_answers.ratio, other_tokens
    return Comparison(*named, kind, len(rows), both + won, both + lost, won, lost, mcnemar(won, lost))
