"""The public names, which stay, and their documentation."""

import inspect

import pytest

import hivtp_hf
import hivtp_hf.figures
from hivtp_hf.pruning.registry import METHODS

pytestmark = pytest.mark.once

PUBLIC = [
    "HIVTPLlavaConfig",
    "HIVTPLlavaForConditionalGeneration",
    "HIVTPLlavaModel",
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "HIVTPLlavaProcessor",
    "TokenLayout",
    "VisualTokenPruningConfig",
    "select_hivtp",
]


def own_members(cls):
    """Public functions and properties that the class itself defines, overridden transformers methods included."""
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield f"{cls.__name__}.{name}", getattr(cls, name)


def test_public_names():
    assert sorted(set(hivtp_hf.__all__) - {"__version__"}) == sorted(PUBLIC)


def test_everything_public_is_documented():
    members = [(name, getattr(hivtp_hf, name)) for name in PUBLIC]
    members += [member for _, cls in members if inspect.isclass(cls) for member in own_members(cls)]
    members += [(name, getattr(hivtp_hf.figures, name)) for name in hivtp_hf.figures.__all__]
    assert [name for name, member in members if not inspect.getdoc(member)] == []


def test_every_setting_and_method_is_documented():
    documentation = inspect.getdoc(hivtp_hf.VisualTokenPruningConfig)
    for name in ("method", "retention_ratio", "token_budget", "exact_count", "keep_newlines"):
        assert f"    {name} (`" in documentation
    for method in METHODS.values():
        assert f'"{method.name}": ' in documentation
        for hyperparameter in method.settings:
            kind, default = hyperparameter.kind.__name__, hyperparameter.default
            assert f"    {hyperparameter.name} ({kind}, {default}" in documentation
