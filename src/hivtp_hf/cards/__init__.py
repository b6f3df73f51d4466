"""Model cards, rendered from the files of templates/. Never travels with checkpoints."""

from .card_files import no_weights_notice
from .model_card import PLACEHOLDER_OWNER, model_card, with_repository

__all__ = ["PLACEHOLDER_OWNER", "model_card", "no_weights_notice", "with_repository"]
