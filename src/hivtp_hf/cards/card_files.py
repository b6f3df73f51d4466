"""The templates of model cards."""

from pathlib import Path

from jinja2 import Template

_FOLDER = Path(__file__).parent / "templates"


def card_template() -> str:
    """The Jinja template of a pruned checkpoint's model card."""
    return (_FOLDER / "pruned_checkpoint.md.jinja").read_text(encoding="utf-8")


def no_weights_notice(base: str | None, base_commit: str | None, repo_id: str) -> str:
    """The paragraphs of a card that say where the weights are which its repository has not.

    Args:
        base: the repository on the Hub that has them; None for a folder of somebody's machine.
        base_commit: its commit.
        repo_id: the repository without weights.
    """
    template = Template((_FOLDER / "no_weights.md.jinja").read_text(encoding="utf-8"))
    return template.render(base=base, base_commit=base_commit, repo_id=repo_id).strip()
