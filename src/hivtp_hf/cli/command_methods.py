"""`hivtp methods`."""

from collections.abc import Iterable, Iterator
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..families import FAMILIES
from ..pruning.evidence import Evidence, methods_of
from ..pruning.registry import METHODS
from ..pruning.settings import SHARED_SETTINGS, Setting
from .printing import say

_CLASS_TOKEN = "CLS: where the vision tower has a class token, as CLIP has and SigLIP has not."


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
) -> None:
    """Show which methods run on which families, and every setting with its type, default, range and meaning."""
    if markdown:
        print("\n".join(_page()))
        return
    table = Table(box=box.SIMPLE, caption=_CLASS_TOKEN)
    table.add_column("method", no_wrap=True)
    for family in FAMILIES:
        table.add_column(family.title, justify="center", no_wrap=True)
    for row in _matrix():
        table.add_row(*row)
    Console().print(table)
    say("All methods:")
    for setting in SHARED_SETTINGS.values():
        say(f"  {setting}")
    for name, method in METHODS.items():
        say(f"{name}: {method.rule}.")
        for setting in method.settings:
            say(f"  {setting}")


def _matrix() -> Iterator[list[str]]:
    """A row for each method: its name, and whether it runs on each family."""
    for name in METHODS:
        yield [name, *(_runs(name, family.provides) for family in FAMILIES)]


def _runs(method: str, provided: frozenset[Evidence]) -> str:
    if method not in methods_of(provided):
        return "no"
    return "yes" if method in methods_of(provided - {Evidence.CLASS_ATTENTION}) else "CLS"


def _page() -> Iterator[str]:
    """The lines of docs/settings.md."""
    yield "# Methods, families and settings"
    yield ""
    yield "`hivtp methods --markdown` prints this page, from what methods and families say of themselves."
    yield ""
    yield "## What runs where"
    yield ""
    yield from _markdown_table(["method", *(family.title for family in FAMILIES)], _matrix())
    yield ""
    yield _CLASS_TOKEN
    yield ""
    yield "## Settings of all methods"
    yield ""
    yield from _settings_table(SHARED_SETTINGS.values())
    for name, method in METHODS.items():
        yield ""
        yield f"## {name}"
        yield ""
        yield f"It keeps {method.rule.removeprefix('a baseline: ')}."
        if method.settings:
            yield ""
            yield from _settings_table(method.settings)


def _settings_table(settings: Iterable[Setting]) -> Iterator[str]:
    rows = (
        [f"`{setting.name}`", setting.kind_name, f"`{setting.default}`", setting.range, setting.meaning] for setting in settings
    )
    return _markdown_table(["setting", "type", "default", "range", "meaning"], rows)


def _markdown_table(headings: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(row)} |"
