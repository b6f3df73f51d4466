"""The files of model_cards/: templates, and the papers of the methods."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Template

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def card_template() -> str:
    """The Jinja template of a pruned checkpoint's model card."""
    return _folder().joinpath("pruned_checkpoint.md.jinja").read_text(encoding="utf-8")


def no_weights_notice(base: str | None, base_commit: str | None, repo_id: str) -> str:
    """The paragraphs of a card that say where the weights are which its repository has not.

    Args:
        base: the repository on the Hub that has them; None for a folder of somebody's machine.
        base_commit: its commit.
        repo_id: the repository without weights.
    """
    template = Template(_folder().joinpath("no_weights.md.jinja").read_text(encoding="utf-8"))
    return template.render(base=base, base_commit=base_commit, repo_id=repo_id).strip()


def citations_of(method: str) -> str:
    """The BibTeX entries of a method's papers; empty for a method without one.

    Args:
        method: a name in the registry of methods.
    """
    entries = _folder().joinpath("citations", f"{method}.bib")
    return entries.read_text(encoding="utf-8").strip() if entries.is_file() else ""


def _folder() -> "Traversable":
    installed = files("hivtp_hf").joinpath("model_cards")
    # In a clone, also where that is installed as editable, the folder lies beside src/; a built package has it inside.
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "model_cards"
