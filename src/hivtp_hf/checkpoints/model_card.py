"""`model_card`: the README.md of a pruned checkpoint, from its own settings."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template

from .._version import __version__
from ..methods.base import PruningMethod
from ..pruning.compat import OLDEST_TRANSFORMERS
from ..pruning.registry import pruning_method
from ..pruning.settings import SHARED_SETTINGS, VisualTokenPruningConfig
from .card_metadata import card_metadata, taken_from_base
from .checkpoint_source import CheckpointSource, open_source
from .inspection import EXAMPLE_SIZES, inspect_checkpoint
from .repository_names import as_repository, is_repository

_TEMPLATES = Path(__file__).parent / "templates"
_COMMIT = re.compile("[0-9a-f]{40}")
_TAGS = ("visual-token-pruning", "token-pruning", "training-free")
_CHAT = """\
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)"""
_PLAIN_PROMPT = 'prompt = f"{processor.image_token}\\nWhat is shown?"'


def model_card(
    folder: str | Path,
    *,
    repo_id: str,
    base_name: str | None = None,
    base_revision: str | None = None,
    base_card: ModelCard | ModelCardData | None = None,
    tuned_on: str | None = None,
) -> ModelCard:
    """The model card of a pruned checkpoint, complete or without weights. Nothing of the folder is executed.

    Args:
        folder: the checkpoint: config.json and the processor's files. Weights are not looked at.
        repo_id: what the examples load, `owner/name`. What the Hub takes for no name becomes a similar one that it does; for a
            checkpoint that is not pushed yet, take `PLACEHOLDER_OWNER` as the owner, and `with_repository` when it is.
        base_name: the repository on the Hub whose weights these are; None where they are from elsewhere. A base that
            config.json names goes before it.
        base_revision: its commit.
        base_card: its own card, or that card's metadata: licence and language are taken over from there where they are
            well-formed.
        tuned_on: how the settings were found, in a paragraph; None where nobody says.

    Raises:
        ValueError: for a folder that is no pruned checkpoint.
    """
    source = open_source(str(folder))
    if not source.is_pruned:
        raise ValueError(f"{folder} is a stock checkpoint; a card describes a pruned one. Make one with `hivtp convert`.")
    if source.base is not None:
        base_name, base_revision = source.base.name, source.base.revision
    base_name = base_name if is_repository(base_name) else None
    commit = base_revision if base_name is not None and _COMMIT.fullmatch(base_revision or "") else None

    pruning = source.settings()
    method, stock_type = pruning_method(pruning.method), source.family.classes.config.stock_model_type
    taken_over = taken_from_base(base_card, source.folder, base_name=base_name, base_revision=commit)
    tags = [*_TAGS, *([] if method.keeps_everything else [method.name]), stock_type]
    has_template = (source.folder / "chat_template.jinja").is_file()
    card = ModelCard.from_template(
        card_metadata(base_name=base_name, tags=tags, taken_over=taken_over),
        template_str=(_TEMPLATES / "pruned_checkpoint.md.jinja").read_text(encoding="utf-8"),
        base=base_name,
        base_commit=commit,
        base_is_needed=source.base is not None,
        no_weights=no_weights_notice(base_name, commit, as_repository(repo_id)),
        licences=_licences(taken_over),
        stock_model_type=stock_type,
        method=method,
        method_keeps=_what_is_kept(method),
        pruning=pruning,
        settings=list(_settings(pruning, method)),
        tuned_on=tuned_on,
        keeps_at_least_one=source.family.keeps_at_least_one,
        names_layers=any(setting.is_layer for setting in method.settings),
        sizes=_sizes(source),
        oldest_transformers=".".join(map(str, OLDEST_TRANSFORMERS)),
        repo_id=as_repository(repo_id),
        model_class=source.family.classes.model.__name__,
        code_file=f"{source.family.classes.config.model_type}.py",
        processor_class=source.family.classes.processor.__name__,
        prompt_code=_CHAT if has_template else _PLAIN_PROMPT,
        citations=method.citation.strip(),
        version=__version__,
    )
    card.text = card.text.rstrip() + "\n"
    return card


def no_weights_notice(base: str | None, base_commit: str | None, repo_id: str) -> str:
    """The paragraphs of a card that say where the weights are which its repository has not.

    Args:
        base: the repository on the Hub that has them; None for a folder of somebody's machine.
        base_commit: its commit.
        repo_id: the repository without weights.
    """
    template = Template((_TEMPLATES / "no_weights.md.jinja").read_text(encoding="utf-8"))
    return template.render(base=base, base_commit=base_commit, repo_id=repo_id).strip()


def _what_is_kept(method: PruningMethod) -> str:
    """The method's rule as the end of a sentence, with links to its papers."""
    rule = method.rule.removeprefix("a baseline: ")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", rule)


def _settings(pruning: VisualTokenPruningConfig, method: PruningMethod) -> Iterator[dict[str, Any]]:
    """Rows of the table: every setting with its value and what it means."""
    described = (*SHARED_SETTINGS.values(), *method.settings)
    meanings = {"method": "how tokens are chosen"} | {setting.name: setting.meaning for setting in described}
    for name, value in pruning.to_dict().items():
        yield {"name": name, "value": value, "meaning": meanings[name].replace("|", r"\|")}


def _sizes(source: CheckpointSource) -> list[dict[str, Any]]:
    """Rows of the table: token counts by image size; one row where all images have the same."""
    rows = [
        {
            "size": f"{size.height} x {size.width}",
            "stock": size.stock_tokens,
            "kept": size.retained_tokens,
            "newlines": size.newlines,
        }
        for size in inspect_checkpoint(str(source.folder), EXAMPLE_SIZES).sizes
    ]
    sizeless = [row | {"size": "any"} for row in rows]
    return sizeless[:1] if all(row == sizeless[0] for row in sizeless) else rows


def _licences(metadata: dict[str, Any]) -> str:
    """The licence or licences for the text, linked where the metadata have a link; empty where they are unknown."""
    given, link = metadata.get("license", []), metadata.get("license_link")
    names = [given] if isinstance(given, str) else given
    if given in ("other", "unknown"):  # the Hub's words for licences that it has no word for
        names = [metadata["license_name"]] if "license_name" in metadata else []
    shown = ", ".join(f"`{name}`" for name in names)
    return f"[{shown or 'see there'}]({link})" if link else shown
