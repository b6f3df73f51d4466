"""What all figures share: whether they can be drawn, at which resolution, of which scores, and the colour of each method.

Figures need matplotlib (`pip install "hivtp-hf[plots]"`), which is imported when one is asked for. No pyplot, so neither a
display nor state that outlives a call.
"""

from torch import Tensor

DPI = 300

# Okabe and Ito's colours, which people tell apart however they see colours.
METHOD_COLOURS = {
    "hivtp": "#0072B2",
    "hiprune": "#56B4E9",
    "gprune": "#E69F00",
    "cls_attention": "#009E73",
    "random": "#CC79A7",
    "uniform": "#F0E442",
}
# Of a method without a colour of its own.
OTHER_COLOUR = "#444444"


def can_plot() -> bool:
    """Whether matplotlib is here."""
    try:
        # The package itself first: with a part of it imported before, the part alone would be found without it.
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def check_matplotlib() -> None:
    """A ValueError where matplotlib is missing."""
    if not can_plot():
        raise ValueError('figures need matplotlib, which is not installed: pip install "hivtp-hf[plots]".')


def check_finite(scores: Tensor, valid: Tensor) -> None:
    """A ValueError where scores of valid cells are not finite; both (tiles, grid, grid)."""
    wrong = int((valid & ~scores.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"`scores` has {wrong} values that are not finite. Where they come from a model in float16, load it in bfloat16 "
            "or float32."
        )
