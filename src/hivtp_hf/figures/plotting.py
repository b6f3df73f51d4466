"""What all figures share: whether they can be drawn, at which resolution, of which scores, and the colours of methods.

Figures need matplotlib (`pip install "hivtp-hf[plots]"`), which is imported when one is asked for. No pyplot, so neither a
display nor state that outlives a call.
"""

from torch import Tensor

from ..pruning.registry import METHODS

DPI = 300

# Methods bring their own colours, mostly Okabe and Ito's, which people tell apart however they see colours. This is that of
# what is no method.
OTHER_COLOUR = "#444444"


def method_colours() -> dict[str, str]:
    """The colour of every method, by its name."""
    return {name: method.colour for name, method in METHODS.items()}


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
    """A ValueError where scores of valid cells are not finite; both of one shape."""
    wrong = int((valid & ~scores.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"`scores` has {wrong} values that are not finite. Where they come from a model in float16, load it in bfloat16 "
            "or float32."
        )
