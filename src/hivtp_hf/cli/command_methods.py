"""`hivtp methods`."""

from rich import box
from rich.console import Console
from rich.table import Table

from ..families import FAMILIES
from ..families.base import methods_of
from ..pruning.evidence import Evidence
from ..pruning.registry import METHODS
from ..pruning.settings import SHARED_SETTINGS
from .printing import say


def methods() -> None:
    """Show which methods run on which families, and every setting with its type, default, range and meaning."""
    table = Table(box=box.SIMPLE, caption="CLS: where the vision tower has a class token, as CLIP has and SigLIP has not.")
    table.add_column("method", no_wrap=True)
    for family in FAMILIES:
        table.add_column(family.title, justify="center", no_wrap=True)
    for name in METHODS:
        table.add_row(name, *(_runs(name, family.provides) for family in FAMILIES))
    Console().print(table)
    say("All methods:")
    for setting in SHARED_SETTINGS.values():
        say(f"  {setting}")
    for name, method in METHODS.items():
        say(f"{name}: {method.rule}.")
        for setting in method.settings:
            say(f"  {setting}")


def _runs(method: str, provided: frozenset[Evidence]) -> str:
    if method not in methods_of(provided):
        return "no"
    return "yes" if method in methods_of(provided - {Evidence.CLASS_ATTENTION}) else "CLS"
