"""Arguments of stock calls, whose order and names differ between transformers releases."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def parameters_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function, read once."""
    return inspect.signature(function)


@torch.compiler.disable
def named_arguments(function: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, whatever the release's order of parameters."""
    arguments = dict(parameters_of(function).bind(model, *args, **kwargs).arguments)
    arguments.pop("self")
    return {**arguments, **arguments.pop("kwargs", {})}


@torch.compiler.disable
def takes_encoded_images(function: Callable[..., Any]) -> bool:
    """Newer releases take encoded images as an argument of forward, and hand them from step to step in generate()."""
    return "mm_encoder_outputs" in parameters_of(function).parameters


def as_stock_with_ratio(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a method that stands for a stock one: its signature and documentation, and `retention_ratio` in addition.

    The signature tells others what they may pass: generate() and Trainer drop or refuse what it does not name.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = functools.wraps(stock)(function)
        parameters = list(inspect.signature(stock).parameters.values())
        ratio = inspect.Parameter("retention_ratio", inspect.Parameter.KEYWORD_ONLY, default=None)
        behind = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        wrapped.__signature__ = inspect.Signature([*parameters[: len(parameters) - len(behind)], ratio, *behind])  # type: ignore[attr-defined]
        return wrapped

    return decorate
