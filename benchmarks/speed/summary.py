"""One page about a run, from its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .decode import DECODE
from .dtype_choice import TRIAL
from .environment import Environment
from .memory import ALONE_PEAK, EXTRA_PEAK, PREFILL_PEAK, VISION_PEAK
from .prefill import KV_CACHE, LANGUAGE_MODEL_PREFILL, TIME_TO_FIRST_TOKEN
from .presets import Preset
from .rows import Row
from .sections import SCORING, SELECTION, TOWER, WEIGHING
from .targets import Judgement
from .throughput import THROUGHPUT
from .vision import OWN_WORK_OVER_TOWER
from .weights import OVER, WEIGHING_PEAK
from .wording import JUDGEMENT_HEADINGS, interval_of, judgement_cells, median_of, share, spread_of

_LEGEND = """\
Limit: stock's vision pass, then stock's language model on a prompt as short as the pruned one. Ours leaves out the tower's last
layer, which nothing is read from and stock runs all the same, and so may be below the limit. Published way: an eager tower with
`output_attentions=True`, and the same selection. Times are medians (quartiles) of rounds in which all variants ran in
turn, in random order; ratios are medians over rounds, with an interval that holds the true median with the probability in
brackets. Weights are random, shapes are as named. Definitions: benchmarks/README.md; all numbers: the CSV file of the same
name."""

_PUBLISHED = """\
From the abstract of HIVTP (arXiv 2509.23663), **published, not measured here**, on trained models and the authors' machine:

| model | time to first token | throughput |
|---|---|---|
| LLaVA-v1.5-7B | up to 50.0 % shorter | up to 60.9 % higher |
| LLaVA-NeXT-7B | up to 55.1 % shorter | up to 47.3 % higher |"""


@dataclass(frozen=True)
class Report:
    """A run, as far as it has come.

    Attributes:
        missing: what was not measured, and why, in sentences.
        command: that repeats it.
    """

    environment: Environment
    preset: Preset
    rows: Sequence[Row]
    judgements: Sequence[Judgement]
    missing: Sequence[str]
    command: str


def summary(report: Report) -> str:
    """The page, as Markdown."""
    environment = report.environment
    sections = [
        f"# Speed of hivtp_hf, preset `{report.preset.name}`\n",
        f"{report.preset.description[0].upper()}{report.preset.description[1:]}. {environment.device}; {environment.dtype}, "
        f"{environment.threads} CPU threads, torch {environment.torch}, transformers {environment.transformers}, Python "
        f"{environment.python}; {environment.date}, commit {environment.commit}. `{report.command}`\n",
        *_trial_sentence(report.rows),
        f"{_LEGEND}\n",
        "## Targets\n",
        table(JUDGEMENT_HEADINGS, [judgement_cells(judgement) for judgement in report.judgements]),
        *_first_token_sections(report.rows),
        *_vision_section(report.rows),
        *_rest_section(report.rows),
        *_weights_section(report.rows),
        "## Beside published numbers\n",
        f"{_PUBLISHED}\n",
        *_own_beside_published(report.rows),
    ]
    if report.missing:
        sections += ["## Not measured\n", "\n".join(f"* {sentence}" for sentence in report.missing) + "\n"]
    return "\n".join(sections)


def _trial_sentence(rows: Sequence[Row]) -> list[str]:
    tried = [f"{median_of(row)} in {row.note}" for row in all_of(rows, TRIAL)]
    return [f"The dtype was chosen by a trial: {TRIAL} took {', '.join(tried)}.\n"] if tried else []


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with an empty line after it."""
    written = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in written) + "\n"


def find(rows: Iterable[Row], quantity: str, **columns: object) -> Row | None:
    """The first row of a quantity with these columns."""
    return next(iter(all_of(rows, quantity, **columns)), None)


def all_of(rows: Iterable[Row], quantity: str, **columns: object) -> list[Row]:
    """The rows of a quantity with these columns."""
    return [
        row for row in rows if row.quantity == quantity and all(getattr(row, name) == value for name, value in columns.items())
    ]


def _first_token_sections(rows: Sequence[Row]) -> list[str]:
    sections = []
    for image in _in_order(row.image for row in all_of(rows, TIME_TO_FIRST_TOKEN)):
        of_image = [row for row in rows if row.image == image and row.part == "prefill"]
        stock = find(of_image, TIME_TO_FIRST_TOKEN, variant="stock")
        ours = all_of(of_image, TIME_TO_FIRST_TOKEN, variant="ours")
        methods = _in_order(row.method for row in ours)
        lines = []
        for ratio in _in_order(row.ratio for row in ours):
            of_ratio = [row for row in ours if row.ratio == ratio]
            # Methods may differ by a token or two, and each has the limit of its own length.
            limit = find(of_image, TIME_TO_FIRST_TOKEN, variant="limit", tokens=of_ratio[0].tokens)
            cells = [share(ratio), str(of_ratio[0].tokens), median_of(limit)]
            for method in methods:
                row = find(of_ratio, TIME_TO_FIRST_TOKEN, method=method)
                over = find(of_image, f"{TIME_TO_FIRST_TOKEN} over limit", variant="ours", method=method, ratio=ratio)
                own = find(of_image, "limit plus own work over limit", method=method, ratio=ratio)
                known = row is not None and over is not None and own is not None
                cells.append(f"{median_of(row)}: {median_of(over)}, {median_of(own)}" if known else "-")
            lines.append(cells)
        if stock is None or not lines:
            continue
        sections += [
            f"## Time to first token, {image}, batch 1\n",
            f"Stock: {spread_of(stock)} with {stock.tokens} image tokens. Of each method the time, its ratio to the limit of "
            "the same length, and what scoring and selection, as timed inside the run, would add to that limit if every layer "
            "of the tower ran.\n",
            table(["ratio", "image tokens", "limit", *methods], lines),
        ]
    return sections


def _vision_section(rows: Sequence[Row]) -> list[str]:
    sections = []
    rows = [row for row in rows if row.part == "vision"]
    for image in _in_order(row.image for row in all_of(rows, TOWER)):
        lines = []
        for tower in all_of(rows, TOWER, image=image):
            where = {"image": image, "variant": tower.variant, "method": tower.method}
            lines.append(
                [
                    " ".join(word for word in (tower.variant, tower.method) if word),
                    spread_of(tower),
                    *(median_of(find(rows, name, **where)) for name in (SCORING, SELECTION)),
                    _with_interval(find(rows, "tower over stock", **where)),
                    median_of(find(rows, OWN_WORK_OVER_TOWER, **where)),
                    _with_interval(find(rows, "tower over published way", **where)),
                ]
            )
        ratios = ["with choice / stock", "stock + own work / stock", "with choice / published way"]
        headings = ["variant", "tower", "scoring", "selection", *ratios]
        sections += [f"## Vision tower, {image}, batch 1\n", table(headings, lines)]
    return sections


def _with_interval(row: Row | None) -> str:
    return "-" if row is None else f"{median_of(row)}, {interval_of(row)}"


def _rest_section(rows: Sequence[Row]) -> list[str]:
    """Decode, throughput, memory and operations, of the variants that were measured in one of these."""
    shown = {
        "language model prefill": lambda key: _of_part(rows, "prefill", LANGUAGE_MODEL_PREFILL, key),
        "KV cache": lambda key: _of_part(rows, "prefill", KV_CACHE, key),
        "decode per token": lambda key: _of_part(rows, "decode", DECODE, key),
        "throughput, batch 1": lambda key: _of_part(rows, "throughput", THROUGHPUT, key),
        "FLOPs to first token": lambda key: _of_part(rows, "memory", "FLOPs to the first token", key),
        "peak memory to first token": lambda key: _of_part(rows, "memory", PREFILL_PEAK, key),
    }
    keys = _in_order(
        (row.variant, row.method, row.ratio, row.tokens) for row in rows if row.part in ("decode", "throughput", "memory")
    )
    lines = []
    for key in keys:
        cells = [median_of(of_key(key)) for of_key in shown.values()]
        if any(cell != "-" for cell in cells[2:]):
            variant, method, ratio, tokens = key
            lines.append([" ".join(filter(None, (variant, method))), share(ratio), str(tokens), *cells])
    sections = []
    if lines:
        sections += [
            "## Language model, cache, memory, first image size, batch 1\n",
            table(["variant", "ratio", "image tokens", *shown], lines),
        ]
    return sections + _throughput_section(rows) + _vision_memory_section(rows)


def _throughput_section(rows: Sequence[Row]) -> list[str]:
    found = all_of(rows, THROUGHPUT)
    if not found:
        return []
    names = _in_order(_name(row) for row in found)
    lines = []
    for new_tokens, batch in _in_order((row.new_tokens, row.batch) for row in found):
        of_names = {_name(row): row for row in all_of(found, THROUGHPUT, new_tokens=new_tokens, batch=batch)}
        lines.append([str(new_tokens), str(batch), *(median_of(of_names.get(name)) for name in names)])
    largest = {_name(row): f"{row.median:g} images" for row in all_of(rows, "largest batch")}
    if largest:
        lines.append(["", "largest", *(largest.get(name, "-") for name in names)])
    return ["## Throughput\n", table(["new tokens", "batch", *names], lines)]


def _vision_memory_section(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in all_of(rows, VISION_PEAK):
        where = {"variant": row.variant, "method": row.method, "batch": row.batch}
        extra = find(rows, EXTRA_PEAK, **where)
        alone = find(rows, ALONE_PEAK, **where)
        lines.append([_name(row), str(row.batch), *map(median_of, (row, extra, alone))])
    headings = ["variant", "batch", "peak", "more than stock", "scoring and selection alone"]
    return ["## Peak memory of the vision pass\n", table(headings, lines)] if lines else []


def _weights_section(rows: Sequence[Row]) -> list[str]:
    """What weights and original positions cost: ratios to the same method without them."""
    rows = [row for row in rows if row.part == "weights"]
    ratios = _in_order(row.quantity for row in rows if row.quantity.endswith(OVER))
    lines = []
    for row in all_of(rows, WEIGHING):
        where = {"variant": row.variant, "method": row.method, "ratio": row.ratio}
        found = [find(rows, quantity, **where) for quantity in ratios]
        shown = [median_of(of_ratio) if interval_of(of_ratio) == "-" else _with_interval(of_ratio) for of_ratio in found]
        lines.append([row.method, share(row.ratio), spread_of(row), *shown, median_of(find(rows, WEIGHING_PEAK, **where))])
    headings = ["method", "ratio", "weighing", *(quantity.removesuffix(f" {OVER}") for quantity in ratios), WEIGHING_PEAK]
    title = f"## Token weights and original positions, {rows_image(rows)}, batch 1\n"
    return [title, f"Ratios are {OVER}.\n", table(headings, lines)] if lines else []


def _name(row: Row) -> str:
    """A variant in words."""
    return " ".join(filter(None, (row.variant, row.method, share(row.ratio) if row.variant != "stock" else "")))


def _of_part(rows: Sequence[Row], part: str, quantity: str, key: tuple) -> Row | None:
    """A variant's row of a part: of the first image size, batch 1, and the fewest new tokens."""
    variant, method, ratio, tokens = key
    columns = {"variant": variant, "method": method, "ratio": ratio, "tokens": tokens, "batch": 1, "part": part}
    return find(rows, quantity, **columns)


def _own_beside_published(rows: Sequence[Row]) -> list[str]:
    """What this run has of the same quantities, in the words of the published ones."""
    lines = []
    for name in (TIME_TO_FIRST_TOKEN, THROUGHPUT):
        for row in all_of(rows, f"{name} over stock", variant="ours", method="hivtp", image=rows_image(rows)):
            at = f"batch {row.batch}" + (f", {row.new_tokens} new tokens" if row.new_tokens else "")
            lines.append([name, share(row.ratio), at, f"{(row.median - 1) * 100:+.1f} %"])
    if not lines:
        return []
    headings = ["quantity", "ratio", "at", "hivtp against stock"]
    return [
        "Measured in this run, on the model of this preset:\n",
        table(headings, lines),
        "A preset with few layers has a larger share of the vision tower than the model that its width is of, so its gain is "
        "smaller.\n",
    ]


def rows_image(rows: Sequence[Row]) -> str:
    """The first image size of a run."""
    return next((row.image for row in rows if row.image), "")


def _in_order(values: Iterable) -> list:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))
