"""`PrunedLmms`: what both kinds of tasks share: loading, batches, answers, and the sums for the file of results."""

import functools
import json
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from ..evaluation.prompts import has_first_token
from ..families import FAMILIES
from ..families.base import Family
from ..pruning.checked_values import checked_number, shown
from .generation_arguments import GenerationArguments, generation_arguments
from .loaded_checkpoint import checked_template, loaded_checkpoint
from .manifests import class_name
from .prompts import RowPrompt, prompt_of_messages
from .run_failure import RunFailure, failing_with_the_row
from .token_sums import TokenSums, settings_as_numbers, summed

_ARGUMENTS = (
    *("pretrained", "revision", "device", "device_map", "dtype", "attn_implementation", "trust_remote_code", "chat_template"),
    *("use_cache", "batch_size"),
)


@dataclass(frozen=True)
class TaskRow:
    """A row of a task, as messages call it."""

    index: int
    request: Any
    task: str
    split: str
    doc_id: int

    def __str__(self) -> str:
        return f"row {self.doc_id} of the task {self.task!r} (split {self.split!r})"


class PrunedLmms(lmms):
    """A pruned model in lmms-eval.

    Args:
        pretrained: a stock, pruned or config-only checkpoint: a folder, or owner/name on the Hub.
        revision: a branch, tag or commit on the Hub.
        device: of torch; by default, and where it is no more than a kind, what accelerate names for this process.
        device_map: in place of a device, for one process only.
        dtype: "auto" is the checkpoint's own.
        attn_implementation, trust_remote_code: as for `from_pretrained`.
        chat_template: a Jinja template, or a file with one, in place of the processor's. Its messages hold lists of parts.
        use_cache: of `generate`.
        batch_size: rows at once.
        max_batch_size: comes with lmms-eval's `--batch_size auto`, which is refused.
        **pruning: any setting of `VisualTokenPruningConfig`, in place of the checkpoint's.

    Raises:
        ValueError: for arguments that are none or out of range; names them.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        device: str | None = None,
        device_map: Any = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        use_cache: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **pruning: Any,
    ):
        super().__init__()
        self.batch_size = _checked_batch_size(batch_size)
        self.accelerator = Accelerator()
        # Not accelerate's numbers: without an accelerator it starts processes that it then counts as one each.
        if _has_other_processes():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if device_map and self._world_size > 1:
            raise ValueError(
                f"`device_map` is {device_map!r}, and each of {self._world_size} processes has a device of its own. Leave it "
                "out, or run one process."
            )
        own = self.accelerator.device
        # "cuda" alone means the one of this process.
        place = own if device is None or str(device) == own.type else device
        placing = {"device_map": device_map or {"": str(place)}}
        self._model, self.processor = loaded_checkpoint(
            str(pretrained),
            self.family,
            self.family.classes.config.model_type,
            pruning,
            revision=None if revision is None else str(revision),
            trust_remote_code=trust_remote_code,
            other_names=_ARGUMENTS,
            dtype=dtype,
            **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
            **placing,
        )
        self.device = self._model.device
        self.pruning_config = self._model.config.pruning_config
        self.chat_template = checked_template(chat_template, self.processor)
        self._use_cache = use_cache
        ends = self._model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        self._ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self._sums = TokenSums()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "PrunedLmms":
        """As lmms-eval's own; what cannot be built ends the run."""
        try:
            return super().create_from_arg_string(arg_string, additional_config)
        except Exception as error:
            raise RunFailure(f"`--model_args {arg_string}`: {type(error).__name__}: {error}") from error

    @abstractmethod
    def _messages(self, row: TaskRow) -> list[dict[str, Any]]:
        """The chat of a row, in the form of transformers."""

    @abstractmethod
    def _generation_kwargs(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """`generation_kwargs` among the arguments of a request."""

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """An answer to every request.

        Raises:
            RunFailure: where a row goes wrong; names it.
        """
        # Rows that only even out the number of rows among processes are asked of nobody: no process waits for another here.
        results = [GenerationResult("") for _ in requests]
        groups: dict[str, list[TaskRow]] = defaultdict(list)
        for row in rows_of(requests):
            groups[json.dumps(self._generation_kwargs(row.request.args), sort_keys=True, default=str)].append(row)
        with tqdm(total=sum(map(len, groups.values())), disable=self.rank != 0, desc="Model responding") as progress:
            for rows in groups.values():
                how = failing_with_the_row(rows[:1], self._how_to_generate)
                for batch in _batches(rows, self.batch_size):
                    answers, sums = failing_with_the_row(batch, functools.partial(self._answers, how=how))
                    self._sums.add(sums)
                    for row, answer in zip(batch, answers, strict=True):
                        results[row.index] = answer
                    progress.update(len(batch))
        return results

    def _how_to_generate(self, rows: Sequence[TaskRow]) -> GenerationArguments:
        how = generation_arguments(self._generation_kwargs(rows[0].request.args))
        if how.unused:
            logger.warning(f"{rows[0].task}: {', '.join(how.unused)} in generation_kwargs mean nothing to this model.")
        return how

    def _answers(self, rows: Sequence[TaskRow], how: GenerationArguments) -> tuple[list[GenerationResult], TokenSums]:
        prompts = [prompt_of_messages(self.processor, self._messages(row), self.chat_template) for row in rows]
        inputs = self._inputs(prompts)
        tokenizer = self.processor.tokenizer
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                **how.of_generate,
                use_cache=self._use_cache,
                eos_token_id=self._ends,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        sums = self._sums_of(prompts)
        sums.seconds = time.perf_counter() - started
        answers = []
        for tokens, length in zip(new, inputs["attention_mask"].sum(1).tolist(), strict=True):
            ended = next((place + 1 for place, token in enumerate(tokens) if token in self._ends), len(tokens))
            sums.generated_tokens += ended
            text = how.cut(tokenizer.decode(tokens[:ended], skip_special_tokens=True))
            answers.append(GenerationResult(text, TokenCounts(input_tokens=length, output_tokens=ended)))
        return answers, sums

    def _inputs(self, prompts: Sequence[RowPrompt]) -> Any:
        """The model's inputs for some prompts, on its device and in its dtype."""
        # By prompt, as how many images a prompt has may change what is made of them.
        images = [prompt.images for prompt in prompts]
        inputs = self.processor(
            images=images if any(images) else None,
            text=[prompt.text for prompt in prompts],
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if has_first_token(self.processor.tokenizer, prompts[0].text) else {}),
        )
        return inputs.to(self._model.device, self._model.dtype)

    def _sums_of(self, prompts: Iterable[RowPrompt]) -> TokenSums:
        sums = TokenSums()
        for prompt in prompts:
            sums.rows += 1
            for layout in self.processor.prompt_token_layouts([(image.height, image.width) for image in prompt.images]):
                sums.add_image(layout)
        return sums

    def clean(self) -> None:
        """As lmms-eval's own, which every process calls once when all answers are there; adds what goes into the results."""
        # Not while answering: from a cache, one process may have nothing to answer, and another would wait for it.
        all_sums: list[Any] = [self._sums]
        if _has_other_processes():
            all_sums = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(all_sums, self._sums)
        total = summed(all_sums)
        self._sums = TokenSums()
        if self._rank == 0 and total.rows:
            log_metrics(
                total_elapsed_time=total.seconds,
                total_gen_tokens=total.generated_tokens,
                avg_speed=total.generated_tokens / total.seconds if total.seconds else 0.0,
                additional_metrics={**settings_as_numbers(self.pruning_config), **total.metrics()},
            )
        super().clean()

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Not supported: ends the run."""
        raise self._not_supported("several rounds of questions", requests)

    def generate_visual_cot(self, requests: list[Any]) -> list[Any]:
        """Not supported: ends the run."""
        raise self._not_supported("images that a model draws", requests)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Not supported: ends the run."""
        raise RunFailure("`--apply_chat_template` would apply it twice: this model does so by itself. Leave it out.")

    def _not_supported(self, what: str, requests: Sequence[Any]) -> RunFailure:
        task = requests[0].task_name if requests else "one of the tasks"
        return RunFailure(f"{task} needs {what}, which this model does not support. Leave the task out.")


def rows_of(requests: Sequence[Any]) -> list[TaskRow]:
    """The rows of requests, but for those that are only there so that each process has as many."""
    rows = []
    for index, request in enumerate(requests):
        if not request.metadata.get("__padding_only__"):
            split = str(request.metadata.get("split"))
            rows.append(TaskRow(index, request, str(request.task_name), split, request.doc_id))
    return rows


def _has_other_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _batches(rows: Sequence[TaskRow], size: int) -> Iterable[Sequence[TaskRow]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _checked_batch_size(value: Any) -> int:
    if isinstance(value, str) and not value.isdecimal():
        raise ValueError(f"`batch_size` is {shown(value)}; it must be a whole number from 1, such as `--batch_size 4`.")
    return checked_number("batch_size", int(value) if isinstance(value, str) else value, int, 1)


def classes_of_families(base: type[PrunedLmms], ending: str) -> dict[str, type[PrunedLmms]]:
    """By its name a subclass of `base` for every family; `ending` is what the names end in."""
    found = {}
    for family in FAMILIES:
        name = class_name(family, ending)
        documentation = f"{family.title} with pruned visual tokens; arguments as `PrunedLmms`."
        found[name] = type(name, (base,), {"family": family, "__doc__": documentation, "__module__": base.__module__})
    return found
