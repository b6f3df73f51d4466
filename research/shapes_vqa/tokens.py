"""The words of both models, as their tokenizers know them: one token a word, and codes character by character."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.shapes_vqa.vocabulary import COLOURS, COUNTS, DIGITS, KINDS, LETTERS

# What signs are called, beside the kinds of shapes.
SIGN = "sign"
_FUNCTION_WORDS = (
    *("a", "above", "are", "below", "colour", "digit", "how", "is", "left", "many", "of", "on", "or", "right", "shape"),
    *("shapes", "the", "there", "what", "which"),
    *("bottom", SIGN, "top", "written"),
)
_MARKS = ("USER:", "ASSISTANT:", "?", "\n")
# A code has a digit among its three characters, and no word has one. So a character is what has a digit within two of it.
_TOKENS = r"USER:|ASSISTANT:|\n|\d|\w(?=\w?\d)|(?<=\d)\w|(?<=\d\w)\w|\w+|[^\w\s]"
_BETWEEN_CHARACTERS = r"(?<=\b\w) (?=\w\b)"


def words() -> list[str]:
    """Every token but the special ones, in the order of their ids."""
    known = ("yes", "no", *COLOURS, *KINDS, *DIGITS, *COUNTS, *_FUNCTION_WORDS, *_MARKS, *LETTERS)
    return list(dict.fromkeys(known))


def make_tokenizer(special: Sequence[str], unknown: str, **roles: Any) -> PreTrainedTokenizerFast:
    """One token a word; other words are unknown to it. Case is only told apart in the names of the speakers.

    Args:
        special: the special tokens, which have the first ids.
        unknown: the one for unknown words.
        roles: what special tokens are for, as the tokenizer's class calls it.
    """
    vocabulary = {word: index for index, word in enumerate((*special, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("user:", "USER:"), normalizers.Replace("assistant:", "ASSISTANT:")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKENS), behavior="removed", invert=True)
    # Spaces between words, and none between the characters of a code.
    together = decoders.Replace(Regex(_BETWEEN_CHARACTERS), "")
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##"), decoders.Fuse(), together])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, padding_side="left", **roles)
