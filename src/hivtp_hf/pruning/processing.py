"""What every family's processor shares: settings, the budget of one call, and how both are stored and loaded."""

import copy
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from .call_budget import BUDGETS, CallBudget, as_model_input, with_default
from .layout import TokenLayout
from .registry import pruning_method
from .remote_code_file import RemoteCodeMixin
from .settings import VisualTokenPruningConfig, check_no_setting_among

# A mixin's calls to super() reach the stock class that comes behind it.
if TYPE_CHECKING:
    from transformers import ProcessorMixin as _StockProcessor
else:
    _StockProcessor = object

# Stock asks for the number of an image's placeholders from within a call, and takes nothing along.
_call: ContextVar[CallBudget | None] = ContextVar("hivtp_call_budget", default=None)


class PrunedProcessorMixin(RemoteCodeMixin, _StockProcessor):
    """A processor that writes as many placeholders as the model keeps tokens. Comes before the stock class."""

    # What is known of the family alone: a `Family`, as families/base.py describes it.
    family: ClassVar[Any]
    # What calls ask for that name no budget: as it was given at loading, which is where engines give that of a request too.
    _budget_of_calls: Mapping[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pruning_config":
            value = VisualTokenPruningConfig.coerce(value)
            self.family.check_pruning(value)
        super().__setattr__(name, value)

    def __call__(self, images=None, text=None, *args, **kwargs):
        if isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) and not row for row in images):
            raise ValueError(f"`images` is empty: {images!r}; pass at least one image, or None for prompts without images.")
        budget = CallBudget.taken_from(self.pruning_config, kwargs, self._budget_of_calls)
        token = _call.set(budget)
        try:
            inputs = super().__call__(images, text, *args, **kwargs)
        except StopIteration:  # all that releases before 5.23 say
            raise ValueError(
                f"the prompts have more {self.image_token} placeholders than there are images; write one for each image."
            ) from None
        except ZeroDivisionError:
            raise ValueError("an image has a height or a width of 0 pixels; images need at least one pixel.") from None
        finally:
            _call.reset(token)
        number = self._num_images(inputs)
        budget.check_number(number)
        if budget.is_given and number:
            prunings = [budget.of_image(image) for image in range(number)]
            layouts = self.family.layouts_of_inputs(self, inputs, prunings)
            # The settings of a layout hold the ratio that a token budget means for its image.
            ratios = [layout.pruning.retention_ratio or 1.0 for layout in layouts]
            pixels = next(inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in inputs)
            inputs["retention_ratio"] = as_model_input(ratios, like=pixels)
        return inputs

    def _num_images(self, inputs: Any) -> int:
        """How many images, and videos that are pruned, a finished call has."""
        return len(inputs.get("pixel_values", ()))

    def _changed_image_processing(self, given: Any) -> dict[str, Any]:
        """Attributes of the image processor that the keywords of a call stand for, as far as counts depend on them."""
        return {name: given[name] for name in ("size", "crop_size") if given.get(name)}

    def _next_pruning(self) -> VisualTokenPruningConfig:
        """The settings of the image that stock asks about; it asks for each in turn."""
        budget = _call.get()
        return self.pruning_config if budget is None else budget.of_next_image()

    def token_layout(
        self, height: int, width: int, retention_ratio: float | None = None, token_budget: int | None = None
    ) -> TokenLayout:
        """The layout of an image under this processor's settings, or under the budget of one call.

        Args:
            height, width: of the image in pixels.
            retention_ratio, token_budget: as for a call, at most one of them.
        """
        given = with_default(self._budget_of_calls, retention_ratio=retention_ratio, token_budget=token_budget)
        pruning = CallBudget(self.pruning_config, **given).of_image(0)
        return self.family.processor_layout(self, height, width, pruning)

    def prompt_token_layouts(self, sizes: Sequence[tuple[int, int]]) -> list[TokenLayout]:
        """The layouts of the images of one prompt; in most families each as if it were alone.

        Args:
            sizes: (height, width) in pixels, in the order of the prompt.
        """
        return [self.token_layout(height, width) for height, width in sizes]

    def _get_num_multimodal_tokens(self, image_sizes=None, retention_ratio=None, token_budget=None, **kwargs):
        # Only serving engines ask. They count tokens before the image is seen, and never mask a placeholder out.
        if not self.pruning_config.exact_count:
            raise ValueError(
                "`exact_count` is False; serving engines need it True, because they place features by the number of tokens "
                "that an image's size determines. Set `exact_count=True` in the pruning_config of model and processor."
            )
        if self.pruning_config.marks_columns:
            own = pruning_method(self.pruning_config.method).drops_in_stages(self.pruning_config.replace(stages=()))
            raise ValueError(
                f"`token_weights` is {self.pruning_config.token_weights!r}, `positions` {self.pruning_config.positions!r} and "
                f"`stages` {self.pruning_config.stages!r}"
                + (f", and the method {self.pruning_config.method!r} has stages of its own" if own else "")
                + "; serving engines decide by themselves where tokens stand, how they attend to each other, and that every "
                "layer sees all of them. Set `token_weights='none'`, `positions='packed'`, no `stages`"
                + (" and another method" if own else "")
                + " in the pruning_config of model and processor, or serve with `hivtp serve`."
            )
        asked_for = with_default(self._budget_of_calls, retention_ratio=retention_ratio, token_budget=token_budget)
        budget = CallBudget(self.pruning_config, **asked_for)
        if image_sizes is not None:
            budget.check_number(len(image_sizes))
        # Releases before 5.23 write these keyword arguments into defaults of stock's class, where they stay. Only sizes are
        # read.
        asked = self
        given = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        changed = self._changed_image_processing(given)
        if changed:
            asked = copy.copy(self)
            asked.image_processor = copy.copy(self.image_processor)
            for name, value in changed.items():
                setattr(asked.image_processor, name, value)
        token = _call.set(budget)
        try:
            return asked._stock_num_multimodal_tokens(image_sizes)
        finally:
            _call.reset(token)

    def _stock_num_multimodal_tokens(self, image_sizes: Any) -> Any:
        """Stock's own answer, which asks for each image in turn; families override where it does not."""
        return super()._get_num_multimodal_tokens(image_sizes)

    def to_dict(self) -> dict[str, Any]:
        """As for any processor, with `pruning_config` as a plain dict, and which class remote code is to take."""
        output = super().to_dict()
        output.pop("_budget_of_calls", None)
        output["pruning_config"] = self.pruning_config.to_dict()
        output["auto_map"] = self._auto_map()
        return output

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As stock; a pruning setting that is given outside `pruning_config` is a ValueError.

        `retention_ratio` or `token_budget` is what all calls ask for that name none: their inputs say so to the model. Nothing
        of it is saved.
        """
        budget = {name: kwargs.pop(name) for name in BUDGETS if name in kwargs}
        check_no_setting_among(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if budget:
            CallBudget(processor.pruning_config, **budget)  # which says what is wrong with it
            processor._budget_of_calls = budget
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # transformers hands the keywords of from_pretrained to the parts as well; a tokenizer would store ours.
        kwargs.pop("pruning_config", None)
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        # Which tokenizer class transformers believes depends on its release and on the model type: newer ones distrust the
        # class that LLaVA checkpoints record. Under our type they would obey, and give other ids after "<image>".
        kwargs["config"] = cls.family.stock_classes.config()
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
