"""The reference model before training: a small LLaVA-NeXT of stock transformers classes, its tokenizer and its processor."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from examples.shapes_vqa.scenes import TILE
from examples.shapes_vqa.vocabulary import COLOURS, COUNTS, DIGITS, KINDS
from examples.tiny_checkpoint import tiny_processor
from hivtp_hf.families.llava_next import LlavaNextFamily

PATCH = 8
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
_FUNCTION_WORDS = (
    *("a", "above", "are", "below", "colour", "digit", "how", "is", "left", "many", "of", "on", "or", "right", "shape"),
    *("shapes", "the", "there", "what", "which"),
)
_MARKS = ("USER:", "ASSISTANT:", "?", "\n")
PINPOINTS = LlavaNextFamily().tiny_config_values(TILE)["image_grid_pinpoints"]


def words() -> list[str]:
    """Every token, by its id."""
    known = ("yes", "no", *COLOURS, *KINDS, *DIGITS, *COUNTS, *_FUNCTION_WORDS, *_MARKS)
    return [*_SPECIAL, *dict.fromkeys(known)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; other words are unknown to it. Case is only told apart in the names of the speakers."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words())}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("user:", "USER:"), normalizers.Replace("assistant:", "ASSISTANT:")]
    )
    pattern = Regex(r"USER:|ASSISTANT:|\n|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # puts spaces between words
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_config() -> LlavaNextConfig:
    """3.6 million parameters; heads of 32 in the tower and 64 in the language model, which serving kernels take."""
    vision = CLIPVisionConfig(
        image_size=TILE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=10,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=_SPECIAL.index("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(TILE // PATCH) ** 2,
        tie_word_embeddings=True,
    )


def make_processor(config: LlavaNextConfig) -> LlavaNextProcessor:
    """The stock processor of the model."""
    return tiny_processor(config, make_tokenizer())


def make_model(config: LlavaNextConfig, seed: int) -> LlavaNextForConditionalGeneration:
    """The model with random weights; `starting_point` then sets what training builds on."""
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(config)
