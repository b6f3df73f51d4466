"""Numbers as people read them."""

from fractions import Fraction

from .rows import Row
from .targets import MET, MISSED, Judgement

_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
    "FLOPs": ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs")),
}


def amount(value: float, unit: str) -> str:
    """A value with a unit of a fitting size, three significant digits."""
    scales = _SCALES.get(unit)
    if scales is None:
        return f"{value:.3f}" if unit == "ratio" else f"{value:.4g} {unit}".strip()
    if value == 0:
        return f"0 {unit}"
    size, name = next((scale for scale in scales if abs(value) >= scale[0]), scales[-1])
    scaled = value / size
    digits = max(0, 3 - len(f"{abs(scaled):.0f}"))
    return f"{scaled:.{digits}f} {name}"


def median_of(row: Row | None) -> str:
    """A row's median; a dash where there is no such row."""
    return "-" if row is None else amount(row.median, row.unit)


def spread_of(row: Row | None) -> str:
    """A row's median with its quartiles, where there is more than one value."""
    if row is None or row.repeats == 1:
        return median_of(row)
    return f"{amount(row.median, row.unit)} ({amount(row.q25, row.unit)} to {amount(row.q75, row.unit)})"


def interval_of(row: Row | None) -> str:
    """A row's interval with the probability that it holds the median."""
    if row is None or row.low is None or row.high is None or row.coverage is None:
        return "-"
    return f"{amount(row.low, row.unit)} to {amount(row.high, row.unit)} ({row.coverage:.0%})"


def share(ratio: float | None) -> str:
    """A retention ratio as people write it."""
    if ratio is None:
        return ""
    fraction = Fraction(ratio).limit_denominator(100)
    return str(fraction) if abs(fraction - Fraction(ratio)) < 1e-9 else f"{ratio:g}"


def judgement_cells(judgement: Judgement) -> list[str]:
    """A judgement as a row of a table: target, bound, worst measured, its interval, where, verdict."""
    target, worst = judgement.target, judgement.worst
    where = "-"
    if worst is not None:
        known = (worst.variant, worst.method, share(worst.ratio) if worst.method else "", worst.image, worst.note)
        words = [word for word in known if word]
        words += [f"batch {worst.batch}"] * (worst.batch is not None and worst.batch > 1)
        words += [f"{worst.new_tokens} new tokens"] * (worst.new_tokens is not None)
        where = ", ".join(words) or "-"
    verdict = judgement.verdict
    if judgement.verdict in (MET, MISSED) and judgement.rows > 1:
        verdict += f", {judgement.kept} of {judgement.rows} keep it"
    if judgement.verdict in (MET, MISSED) and not judgement.is_settled:
        verdict += ", the interval reaches across"
    bound = f"at most {amount(target.most, target.unit)}" if target.most else f"0 {target.unit}"
    return [target.name, bound, median_of(worst), interval_of(worst), where, verdict]


JUDGEMENT_HEADINGS = ("target", "bound", "measured, worst", "interval", "where", "verdict")
