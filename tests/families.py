"""The model families, as tests are parametrised over them: stock's classes and ours."""

from typing import Any, NamedTuple

import transformers

import hivtp_hf


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


def _family(name: str, stock_prefix: str) -> Family:
    parts = ("Config", "Model", "ForConditionalGeneration", "Processor")
    stock = [getattr(transformers, f"{stock_prefix}{part}") for part in parts]
    return Family(name, *stock, *(getattr(hivtp_hf, f"HIVTP{stock_prefix}{part}") for part in parts))


FAMILIES = {family.name: family for family in (_family("llava_next", "LlavaNext"), _family("llava", "Llava"))}


def family_of(config: Any) -> Family:
    """The family of a configuration, stock's or ours."""
    return FAMILIES[config.model_type.removeprefix("hivtp_")]
