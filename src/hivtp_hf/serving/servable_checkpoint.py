"""Which checkpoints are served: pruned ones, as a stock one would run unpruned without a word."""

from pathlib import Path

from ..checkpoints import open_source


def check_servable(name: str) -> None:
    """A ValueError unless transformers' server would run the checkpoint pruned. No weights are read or downloaded.

    Args:
        name: a folder, or `owner/name` on the Hub, where `@revision` may follow.

    Raises:
        ValueError: for a stock checkpoint, one of a family that cannot be pruned, and what is no checkpoint.
        OSError, huggingface_hub.errors.HfHubHTTPError: where its configuration cannot be downloaded.
    """
    repository, _, revision = name.partition("@")
    if "@" in name and Path(name).is_dir():
        raise ValueError(
            f"{name} has an @ in its path, which the server takes for a revision's. Rename the folder or link to it."
        )
    source = open_source(repository, revision=revision or None)
    if not source.is_pruned:
        raise ValueError(
            f"{name} is a stock checkpoint (model type {source.config['model_type']!r}), which would be served unpruned. "
            f"Make a pruned one of it, which takes no weights: hivtp convert --config-only {repository} TARGET "
            "--retention-ratio RATIO. Then serve TARGET."
        )
