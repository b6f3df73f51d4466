"""The public names, which stay, and their documentation."""

import inspect

import pytest

import hivtp_hf
import hivtp_hf.figures
from hivtp_hf.pruning.registry import METHODS
from hivtp_hf.pruning.settings import SHARED_SETTINGS

pytestmark = pytest.mark.once

PUBLIC = [
    "EncoderFacts",
    "Evidence",
    "HIVTPLlavaConfig",
    "HIVTPLlavaForConditionalGeneration",
    "HIVTPLlavaModel",
    "HIVTPLlavaNextConfig",
    "HIVTPLlavaNextForConditionalGeneration",
    "HIVTPLlavaNextModel",
    "HIVTPLlavaNextProcessor",
    "HIVTPLlavaOnevisionConfig",
    "HIVTPLlavaOnevisionForConditionalGeneration",
    "HIVTPLlavaOnevisionModel",
    "HIVTPLlavaOnevisionProcessor",
    "HIVTPLlavaProcessor",
    "HIVTPQwen2VLConfig",
    "HIVTPQwen2VLForConditionalGeneration",
    "HIVTPQwen2VLModel",
    "HIVTPQwen2VLProcessor",
    "HIVTPQwen2_5_VLConfig",
    "HIVTPQwen2_5_VLForConditionalGeneration",
    "HIVTPQwen2_5_VLModel",
    "HIVTPQwen2_5_VLProcessor",
    "HIVTPQwen3VLConfig",
    "HIVTPQwen3VLForConditionalGeneration",
    "HIVTPQwen3VLModel",
    "HIVTPQwen3VLProcessor",
    "PruningMethod",
    "Setting",
    "StitchedViews",
    "TokenLayout",
    "ViewEvidence",
    "VisualEvidence",
    "VisualTokenPruningConfig",
    "register_method",
    "select_hivtp",
    "tune",
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
    for method in METHODS.values():
        assert f'"{method.name}": ' in documentation
    for setting in (*SHARED_SETTINGS.values(), *(setting for method in METHODS.values() for setting in method.settings)):
        assert f"{setting.name} ({setting.kind_name}, {setting.default}" in documentation
        assert setting.meaning in documentation
