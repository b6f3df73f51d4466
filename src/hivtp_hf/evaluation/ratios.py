"""Ratios as people write them: decimals and fractions."""

from fractions import Fraction

DEFAULT_RATIOS = "1,1/2,2/9,1/9,1/18"


def parsed_ratios(text: str) -> tuple[Fraction, ...]:
    """The ratios of a list such as "1,1/2,0.25", exact, largest first and each once.

    Raises:
        ValueError: for what is no number, and for numbers that are not above 0 and at most 1.
    """
    ratios = set()
    for part in text.split(","):
        try:
            ratio = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            ratio = None
        # A share so small that float64 has no number for it keeps nothing of any image.
        if ratio is None or not 0 < float(ratio) <= 1:
            raise ValueError(
                f"`--ratios` is {text!r}, in which {part.strip()!r} is no ratio; give decimals or fractions above 0 and at "
                f"most 1, separated by commas, such as {DEFAULT_RATIOS}."
            )
        ratios.add(ratio)
    return tuple(sorted(ratios, reverse=True))
