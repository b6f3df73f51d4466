"""Wilson's interval for a share.

Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
Statistical Association 22 (1927), 209-212; recommended for small and large samples by Brown, Cai and DasGupta, Interval
estimation for a binomial proportion, Statistical Science 16 (2001), 101-133. The interval holds all shares p for which the
observed one lies within z standard errors sqrt(p (1 - p) / n).
"""

import math
from statistics import NormalDist

_CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Both ends of the 95 % interval for a share, of `correct` among `n`; ValueError unless 0 <= correct <= n > 0."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no share; give a number of trials above 0 and of successes from 0 up to it.")
    share = correct / n
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At both extremes the formula gives 0 and 1 but for rounding.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high
