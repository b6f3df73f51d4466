"""A forward in which the language model is told more of kept tokens than their features.

That is where they stand (`positions`), what they weigh (`token_weights`) and how long they stay (`stages`). All three are known
once images are encoded, and belong to columns of the prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .call_budget import refuse_budget_among
from .compat import cache_among, cache_of, named_arguments
from .pretrained import PrunedPreTrainedMixin
from .prompt_columns import (
    COLUMN_ARGUMENTS,
    PromptColumns,
    check_rows_are_not_packed,
    checked_columns_in_cache,
    columns_of_images,
    given_columns,
    remember_columns,
    unmarked_columns,
)
from .staged_language_model import StagedLanguageModel, calling_in_stages
from .stages import stages_of_language_model
from .surplus_placeholders import cached_length, remember_surplus
from .weighted_attention import check_language_model_can_mark, let_keys_weigh, mask_with_weights, needs_own_mask


class MarkedColumnsMixin(PrunedPreTrainedMixin):
    """The part of a base model that marks columns; what encodes images and finds placeholders is `PrunedModelMixin`'s."""

    def _forward_marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward` where settings mark columns."""
        # Asked here, as it is no within what a compiler leaves out.
        arguments, to_remember, staged = self._with_columns(args, kwargs, torch.compiler.is_compiling())
        model: Any = self if staged is None else calling_in_stages(self, staged)
        output = super(MarkedColumnsMixin, model).forward(**arguments, return_dict=True)
        if to_remember != (None, None):
            _remember_columns_of_call(output, *to_remember)
        return output

    # Python over images and caches, which a compiler would trace anew for each call; it compiles what comes behind.
    @torch.compiler.disable
    def _with_columns(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], is_compiled: bool
    ) -> tuple[dict[str, Any], tuple[PromptColumns | None, Tensor | None], StagedLanguageModel | None]:
        """The arguments of a forward for stock's, with places in its positions and weights in its mask.

        Returns:
            The arguments; what its cache is to remember of columns, or None where generate() sees to that, and of placeholders
            without a token; and what runs in place of the language model, or None where no stage drops anything.
        """
        refuse_budget_among(kwargs)
        pruning = self.config.pruning_config
        arguments = named_arguments(type(self).forward, self, args, kwargs)
        given = given_columns({name: arguments.pop(name, None) for name in COLUMN_ARGUMENTS})
        text_config = self.config.get_text_config()
        check_language_model_can_mark(text_config, pruning)
        encoded = self.encode_ahead(arguments)
        surplus = None if pruning.exact_count else self._mask_surplus(arguments, encoded)
        prompt = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        if prompt is None:
            return arguments, (None, surplus), None  # stock says what is missing
        cache = cache_among(arguments)
        cached = 0 if cache is None else cached_length(cache)
        to_remember: tuple[PromptColumns | None, Tensor | None] = (None, surplus)
        columns = given
        if columns is None:
            columns = self.columns_of_prompt(arguments, encoded, checked_columns_in_cache(cache, cached), cached)
            to_remember = (columns, surplus)
        if columns.is_empty:
            return arguments, to_remember, None
        check_rows_are_not_packed(arguments, cache)
        rows, new = prompt.shape[:2]
        columns = columns.of_rows(rows)
        # With neither a mask nor a cache, stock would take gaps in positions for the ends of sequences packed into a row.
        if arguments.get("attention_mask") is None and cache is None:
            arguments["attention_mask"] = torch.ones(rows, cached + new, dtype=torch.int64, device=prompt.device)
        if pruning.positions != "packed":
            packed = arguments.get("position_ids")
            if packed is None:
                packed = torch.arange(cached, cached + new, device=prompt.device)[None]
            arguments["position_ids"] = packed + columns.shifts_from(cached, new).to(packed.device)
        weighs = needs_own_mask(text_config, pruning)
        if weighs:
            let_keys_weigh(self.language_model, text_config.num_hidden_layers)
        stages = stages_of_language_model(pruning, text_config.num_hidden_layers)
        if stages:
            layers = [layer for layer, _ in stages]
            return arguments, to_remember, StagedLanguageModel(self.language_model, layers, columns, weighs)
        if weighs:
            arguments["attention_mask"] = mask_with_weights(
                arguments.get("attention_mask"),
                columns.log_weights,
                cache,
                cached,
                new,
                self.get_input_embeddings().weight.dtype,
                text_config,
                is_compiled,
            )
        return arguments, to_remember, None

    def columns_of_prompt(
        self, arguments: Mapping[str, Any], encoded: Any, before: PromptColumns | None, cached: int
    ) -> PromptColumns:
        """Where the tokens of a call stand, what they weigh and how long they stay, behind those of its cache.

        Args:
            arguments: of the call, by name; its ids or embeddings are those of new columns.
            encoded: what `get_image_features` returned for its images, or None where it has none.
            before: of the columns that its cache holds, or None where that is empty.
            cached: how many these are.

        Raises:
            ValueError: for images that came encoded without saying what was kept, and for embeddings without their images.
        """
        is_placeholder: Any = self.is_placeholder(arguments)
        pruning = self.config.pruning_config
        settings = (
            f"`token_weights` {pruning.token_weights!r}, `positions` {pruning.positions!r} and `stages` {pruning.stages!r}"
        )
        if encoded is None:
            if arguments.get("input_ids") is None and before is None:
                raise ValueError(
                    f"the prompt came as embeddings without its images; with {settings} the model must know which tokens are "
                    "visual. Give `input_ids` and the images, or "
                    f"{', '.join(f'`{name}`' for name in COLUMN_ARGUMENTS)} as `columns_of_prompt` makes them."
                )
            return unmarked_columns(is_placeholder.device) if before is None else before
        wanted = {
            "kept_indices": True,
            "num_stock": pruning.positions != "packed",
            "log_weights": pruning.weighs_tokens,
            "stages_survived": pruning.drops_in_stages,
        }
        found: dict[str, Any] = {
            name: getattr(encoded, name, None) if is_wanted else None for name, is_wanted in wanted.items()
        }
        lacking = [
            name
            for name, is_wanted in wanted.items()
            if is_wanted and (found[name] is None or len(found[name]) != len(encoded.pooler_output))
        ]
        if lacking:
            raise ValueError(
                f"the images came encoded without {' and '.join(f'`{name}`' for name in lacking)}; with {settings} give them "
                "as this model's `get_image_features` returns them, or as pixels."
            )
        new = columns_of_images(is_placeholder, **found)
        if before is not None:
            return before.followed_by(cached, new)
        # What is kept whole runs as stock runs it.
        return unmarked_columns(is_placeholder.device) if new.say_nothing else new

    # Of `PrunedModelMixin`, which is built on this one.

    encode_ahead: Any
    is_placeholder: Any
    _mask_surplus: Any


@torch.compiler.disable
def _remember_columns_of_call(output: Any, columns: PromptColumns | None, surplus: Tensor | None) -> None:
    cache = cache_of(output)
    if columns is not None:
        remember_columns(cache, columns)
    if surplus is not None:
        remember_surplus(cache, surplus)
