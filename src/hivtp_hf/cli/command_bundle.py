"""`hivtp bundle`."""

from typing import Annotated

import typer

from ..families import FAMILIES
from ..remote_code import bundle as bundle_of


def bundle(
    family: Annotated[str, typer.Argument(help=f"One of {', '.join(family.name for family in FAMILIES)}.")],
) -> None:
    """Print the one Python file that checkpoints of FAMILY carry, by which they load with trust_remote_code."""
    print(bundle_of(family), end="")
