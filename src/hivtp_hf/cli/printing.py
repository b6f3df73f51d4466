"""Lines for people, printed as they are: names of files hold no markup, and what is to be copied is not broken."""

from rich.console import Console


def say(text: str, style: str | None = None) -> None:
    """Prints `text` in a style of rich's."""
    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
