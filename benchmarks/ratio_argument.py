"""`ratio`: a ratio on a command line."""

import argparse
from fractions import Fraction


def ratio(text: str) -> float:
    """The number that a text such as "0.5" or "2/9" means; for `type` of an argument."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio such as 0.5 or 2/9") from None
