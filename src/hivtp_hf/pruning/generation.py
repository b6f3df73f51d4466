"""What every family's model with a language modelling head shares: loss and generation on pruned image features."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .compat import (
    cache_among,
    cache_argument,
    cache_of,
    named_arguments,
    parameters_of,
    prefills_images_in_chunks,
    with_cache_named,
)
from .features import FIELDS_OF_IMAGES
from .look import Look
from .model import PrunedImageFeaturesOutput, PrunedModelMixin, encoded_images, has_pixels
from .pretrained import PrunedPreTrainedMixin
from .prompt_columns import (
    COLUMN_ARGUMENTS,
    PromptColumns,
    checked_columns_in_cache,
    given_columns,
    refuse_columns_among,
    remember_columns,
)
from .surplus_placeholders import (
    cached_length,
    check_cached_placeholders,
    check_sliding_window,
    move_labels,
    remember_surplus,
    surplus_of_features,
    with_cached_surplus,
)
from .weighted_attention import check_language_model_can_mark, needs_own_mask


class PrunedGenerationMixin(PrunedPreTrainedMixin):
    """A model with a language modelling head over a `PrunedModelMixin`, in `self.model`. Comes before the stock class."""

    # Whether images of a later turn must be known before transformers' generate() runs, for the places of their tokens.
    _encodes_later_turns: ClassVar[bool] = False

    def _build_on(self, base_model: Any) -> None:
        """Called by a family's constructor: what stock's does, on a base model of ours."""
        self.model = base_model
        text = self.config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    # One pass of the vision encoder, with all that methods read from it.
    @functools.wraps(PrunedModelMixin.look)
    def look(self, *args: Any, **kwargs: Any) -> Look:
        return self.model.look(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; with `exact_count=False` placeholders without a token take no part in the loss."""
        arguments = kwargs
        if not self.config.pruning_config.exact_count:
            arguments, args = named_arguments(type(self).forward, self, args, kwargs), ()
            if arguments.get("labels") is not None:
                encoded = self.model.encode_ahead(arguments)
                surplus = surplus_of_features(self.model.is_placeholder(arguments), encoded)
                arguments["labels"] = move_labels(arguments["labels"], surplus)
        return super().forward(*args, **arguments)

    # Takes stock's signature and documentation. With `exact_count=False` images are encoded first, since their content
    # decides which placeholders are left over; those are masked out all through the call.
    @functools.wraps(GenerationMixin.generate)
    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = with_cache_named(cache_argument(type(self).forward), kwargs)
        generate = super().generate
        signature = parameters_of(GenerationMixin.generate)
        arguments = {"kwargs": {}, **signature.bind_partial(self, *args, **kwargs).arguments}
        arguments.pop("self")
        inputs = arguments.pop("kwargs")
        prompt = {**inputs, **arguments}
        if prompt.get("inputs") is not None:
            prompt["input_ids"] = prompt["inputs"]
        is_placeholder, pruning = self.model.is_placeholder(prompt), self.config.pruning_config
        self._check_prefill_in_chunks(prompt)
        cache = cache_among(inputs)
        cached = 0 if cache is None else cached_length(cache)
        if pruning.marks_columns:
            check_language_model_can_mark(self.config.get_text_config(), pruning)
        else:
            refuse_columns_among(inputs)
        if is_placeholder is None:
            self.model.check_prompt(prompt)
            return generate(*args, **kwargs)
        is_told = given_columns(inputs) is not None  # by the model that this one assists
        if is_told and not self._encodes_later_turns:
            return generate(**arguments, **inputs)
        before = checked_columns_in_cache(cache, cached) if pruning.marks_columns and not is_told else None
        given, encoded = dict(inputs), None
        new = {name: self._new_columns(prompt, name, cached) for name in ("input_ids", "inputs_embeds")}
        # Of a later turn stock encodes the images itself, and the model holds them against their placeholders.
        if cached == 0 or self._encodes_later_turns or pruning.marks_columns or not pruning.exact_count:
            encoded = self._encode_prompt(prompt, inputs, cached, new)
        placed = self._place_prompt(prompt, inputs, given, encoded, cached)
        columns = None
        if pruning.marks_columns and not is_told:
            columns = self.model.columns_of_prompt(new, encoded, before, cached)
            rows = next(part.shape[0] for part in new.values() if part is not None)
            inputs.update(zip(COLUMN_ARGUMENTS, columns.of_rows(rows), strict=True))
        # Before anything runs: what a call that is broken off has left in the cache is then known all the same.
        self._remember(cache, placed, columns)
        surplus = None if pruning.exact_count else self._mask_surplus_of_prompt(prompt, inputs, is_placeholder, encoded)
        output = generate(**arguments, **inputs)
        # Without `return_dict_in_generate` the tokens come back alone, and a cache that was given has been filled.
        returned = cache_of(output) if isinstance(output, ModelOutput) else None
        self._remember(returned, placed, columns)
        if surplus is not None:
            remember_surplus(cache if returned is None else returned, surplus)
        return output

    def _remember(self, cache: Any, placed: Any, columns: PromptColumns | None) -> None:
        self._remember_placed(cache, placed)
        if columns is not None:
            remember_columns(cache, columns)

    def _place_prompt(
        self, prompt: dict[str, Any], inputs: dict[str, Any], given: Mapping[str, Any], encoded: Any, cached: int
    ) -> Any:
        """Puts positions of a prompt's tokens among the model's inputs, where a family has positions of its own.

        Args:
            prompt: all arguments of the call.
            inputs: the model's inputs among them, with encoded images; changed in place.
            given: the model's inputs as they came.
            encoded: the images, as `get_image_features` returned them, or None where there are none.
            cached: how many columns of the prompt the cache holds.

        Returns:
            What the cache is to remember; None for nothing.
        """
        return None

    def _remember_placed(self, cache: Any, placed: Any) -> None:
        """Lets a cache remember what `_place_prompt` returned."""

    def _encode_prompt(
        self, prompt: Mapping[str, Any], inputs: dict[str, Any], cached: int, new: Mapping[str, Tensor | None]
    ) -> PrunedImageFeaturesOutput | None:
        """The images of a prompt, encoded before generate() runs and left among the model's inputs instead of pixels.

        Args:
            prompt: all arguments of the call.
            inputs: the model's inputs among them; changed in place.
            cached: how many columns of the prompt the cache holds.
            new: those that it does not hold, as `input_ids` or `inputs_embeds`.

        Returns:
            The encoded images; None where there are none, or none that the cache does not hold.
        """
        # The ids of a longer prompt name images of former calls as well.
        layouts = self.model.check_prompt(prompt) if cached == 0 else None
        # An assistant is given its prompt's images again when its cache already holds them.
        if cached and not bool(self.model.is_placeholder(new).any()):
            return None
        of_prompt = {"input_ids", "inputs_embeds"}
        part = {name: value for name, value in {**inputs, **new}.items() if name not in of_prompt or value is not None}
        encoded = self.model.encode_ahead(part, layouts)
        for name in inputs.keys() - part.keys() - of_prompt:
            del inputs[name]
        inputs.update({name: value for name, value in part.items() if name not in of_prompt})
        if encoded is not None:
            # Without what belongs to images alone: generate() repeats and cuts features, and tensors say the rest.
            features_alone = dict.fromkeys(FIELDS_OF_IMAGES)
            features = PrunedImageFeaturesOutput(**{**encoded, **features_alone})
            inputs["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "image": features}
        return encoded

    def _new_columns(self, prompt: Mapping[str, Any], name: str, cached: int) -> Tensor | None:
        """The part of a prompt that the cache does not hold; as in stock, a longer mask tells a part from the whole."""
        given, mask = prompt.get(name), prompt.get("attention_mask")
        if given is None or (name == "inputs_embeds" and prompt.get("input_ids") is not None):
            return None
        is_whole = name == "inputs_embeds" or mask is None or mask.shape[1] == given.shape[1]
        return given[:, cached:] if is_whole else given

    # transformers makes masks of four dimensions for compiled steps. Of a prefill the model makes what it needs itself.
    def create_masks_for_generate(self, config: Any, inputs_embeds: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        """As stock, for caches of a fixed size; with `stages` masks stay as they are, with weights those of several queries."""
        if self.config.pruning_config.drops_in_stages:
            return attention_mask
        weighs = needs_own_mask(config.get_text_config(), self.config.pruning_config)
        adds_by_query = config.get_text_config()._attn_implementation in ("eager", "sdpa")
        if weighs and (inputs_embeds.shape[1] > 1 or not adds_by_query):
            return attention_mask
        return create_masks_for_generate(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    # An assistant of another kind drafts from packed positions and equal weights, and knows no such arguments.
    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        pruning = getattr(getattr(assistant, "config", None), "pruning_config", None)
        if assistant is not None and not getattr(pruning, "marks_columns", False):
            given = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {name: value for name, value in given.items() if name not in COLUMN_ARGUMENTS}
        return super()._get_candidate_generator(*args, **kwargs)

    def _check_prefill_in_chunks(self, prompt: Mapping[str, Any]) -> None:
        """A ValueError where the installed transformers release would drop the images of a prompt without a word."""
        chunk = self._setting(prompt, "prefill_chunk_size")
        if chunk is None or prefills_images_in_chunks():
            return
        has_videos = prompt.get("pixel_values_videos") is not None
        if has_videos or has_pixels(prompt) or encoded_images(prompt) is not None:
            raise ValueError(
                f"`prefill_chunk_size` is {chunk}, with images: transformers {transformers.__version__} drops the images from "
                "a prefill in chunks. The first release that works is 5.23.0 (`pip install --upgrade "
                '"transformers>=5.23.0,<6"`). With the installed one, set `prefill_chunk_size` to None.'
            )

    # All ways into continuous batching ask for a manager here. It takes ids alone, and would answer without the images.
    @functools.wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().init_continuous_batching(*args, **kwargs)
        if "add_request" not in vars(manager):  # a manager that is kept comes here again
            add_request = manager.add_request

            @functools.wraps(add_request)
            def add_checked_request(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
                self._refuse_images_among([input_ids])
                return add_request(input_ids, *args, **kwargs)

            manager.add_request = add_checked_request
        return manager

    # It logs what goes wrong with its requests, and returns nothing: so they are checked before.
    @functools.wraps(GenerationMixin.generate_batch)
    def generate_batch(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._refuse_images_among(inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    def _refuse_images_among(self, prompts: Any) -> None:
        for input_ids in prompts:
            found = sum(int(token) == self.config.image_token_id for token in input_ids)
            if found:
                raise ValueError(
                    f"a prompt has {found} image placeholders, but continuous batching takes token ids alone and would "
                    "answer without seeing an image. Use `generate` for prompts with images, and continuous batching for "
                    "prompts without."
                )

    def _mask_surplus_of_prompt(
        self, prompt: dict[str, Any], inputs: dict[str, Any], is_placeholder: Tensor, encoded: Any
    ) -> Tensor:
        """Masks the surplus of a prompt: changes `inputs`, the model's inputs among a `generate`'s keywords, in place.

        Returns:
            The surplus, bool (batch, prompt).
        """
        cache = cache_among(inputs)
        cached = 0 if cache is None else cached_length(cache)
        check_cached_placeholders(is_placeholder[:, :cached], cache)
        surplus = with_cached_surplus(surplus_of_features(is_placeholder[:, cached:], encoded), cache)
        if surplus.any():
            check_sliding_window(self.config.get_text_config(), self._longest_sequence(prompt, surplus.shape[1]))
        attention_mask = inputs.get("attention_mask")
        if attention_mask is None:
            attention_mask = self._default_attention_mask(prompt, surplus)
        inputs["attention_mask"] = attention_mask.masked_fill(surplus, 0)
        return surplus

    def _setting(self, prompt: Mapping[str, Any], name: str) -> Any:
        """What `generate` will go by: its keyword, else the given configuration, else the model's own."""
        if name in prompt:
            return prompt[name]
        given = getattr(prompt.get("generation_config"), name, None)
        return getattr(self.generation_config, name, None) if given is None else given

    def _longest_sequence(self, prompt: dict[str, Any], length: int) -> int:
        """Positions after a `generate` that meets no end of sequence."""
        new_tokens = self._setting(prompt, "max_new_tokens")
        return length + new_tokens if new_tokens is not None else max(length, self._setting(prompt, "max_length") or 0)

    def _default_attention_mask(self, prompt: dict[str, Any], surplus: Tensor) -> Tensor:
        """As generate() infers it: padding is left out, where it can be told from an end of sequence."""
        padding, end = (self._setting(prompt, name) for name in ("pad_token_id", "eos_token_id"))
        input_ids, ends = prompt.get("input_ids"), end if isinstance(end, (list, tuple)) else [end]
        if input_ids is None or padding is None or padding in ends:
            return torch.ones_like(surplus, dtype=torch.int64)
        return (input_ids != padding).long()
