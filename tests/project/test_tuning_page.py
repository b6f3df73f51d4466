"""docs/tuning.md: where tuning looks, as the methods say."""

import re
from pathlib import Path

import pytest

from hivtp_hf.pruning.registry import METHODS

pytestmark = pytest.mark.once

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def described(setting):
    """How the page says where a setting is searched."""
    found = setting.search_range(0.5)
    if callable(setting.search):
        assert (found, setting.search(0.9)) == ((0.5, 0.75), (0.9, 1.0))
        return "R to 1.5 R, at most 1"
    if setting.kind is tuple:
        return f"{found[0]} to {found[1]} layers side by side, of D"
    if setting.kind is str:
        return ", ".join(setting.choices)
    if found is None:
        assert setting.is_layer
        return "one of D"
    low, high = found
    return f"{low:g} to {high:g}" + (", logarithmic" if low > 0 and high / low >= 100 else "")


def test_the_table_is_that_of_the_methods():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    wanted = [
        (name, setting.name, described(setting))
        for name, method in METHODS.items()
        for setting in method.settings
        if setting.search != ()
    ]
    assert rows == wanted
