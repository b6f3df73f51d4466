"""The LLaVA families, as the tests that they share are parametrised over them: stock's classes and ours.

Qwen-VL's prompts, sizes and positions are others, and stock's processor of LLaVA-OneVision needs torchvision; their tests are
in files of their own.
"""

from typing import Any, NamedTuple

from hivtp_hf.families import FAMILIES as REGISTERED


class Family(NamedTuple):
    """One family's classes.

    Attributes:
        name: as in the names of its files and of its model types.
        stock_config, stock_base, stock_model, stock_processor: of transformers.
        config, base, model, processor: ours.
    """

    name: str
    stock_config: Any
    stock_base: Any
    stock_model: Any
    stock_processor: Any
    config: Any
    base: Any
    model: Any
    processor: Any


FAMILIES = {
    family.name: Family(family.name, *family.stock_classes, *family.classes)
    for family in REGISTERED
    if family.name in ("llava_next", "llava")
}


def family_of(config: Any) -> Family:
    """The family of a configuration, stock's or ours."""
    return FAMILIES[config.model_type.removeprefix("hivtp_")]
