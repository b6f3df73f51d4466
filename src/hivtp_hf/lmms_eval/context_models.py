"""The models for tasks that write a context, and for those that score choices: `--force_simple`."""

from collections.abc import Sequence
from typing import Any

import torch

from .prompts import RowPrompt, messages_of_context, prompt_of_messages
from .pruned_lmms import PrunedLmms, TaskRow, classes_of_families, rows_of
from .run_failure import failing_with_the_row
from .token_sums import TokenSums


class _FromContext(PrunedLmms):
    is_simple = True

    def _messages(self, row: TaskRow) -> list[dict[str, Any]]:
        context, _, doc_to_visual, doc_id, task, split = row.request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return messages_of_context(context, visuals, self.processor.image_token)

    def _generation_kwargs(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return arguments[1]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """How far every continuation is from what the model expects, and whether it is its greedy answer.

        Returns:
            The mean over the tokens of the negative log-likelihood, as lmms-eval's own models return it and as its tasks read
            it: they choose the smallest.

        Raises:
            RunFailure: where a row goes wrong; names it.
        """
        results = [(0.0, False)] * len(requests)
        for row in rows_of(requests):
            results[row.index], sums = failing_with_the_row([row], self._score)
            self._sums.add(sums)
        return results

    def _score(self, rows: Sequence[TaskRow]) -> tuple[tuple[float, bool], TokenSums]:
        prompt, continuation = self._continued(rows[0])
        if prompt.text[-1:].isspace() or continuation[:1].isspace():
            whole = prompt.text + continuation
        else:
            whole = f"{prompt.text} {continuation}"
        before = self._inputs([prompt])["input_ids"][0]
        inputs = self._inputs([prompt._replace(text=whole)])
        tokens = inputs["input_ids"][0]
        shared = min(len(before), len(tokens))
        # The last token of a prompt may be another once something follows it.
        differing = (before[:shared] != tokens[:shared]).nonzero()
        start = int(differing[0]) if len(differing) else shared
        if start == len(tokens):
            raise ValueError(f"the continuation {continuation!r} has no tokens. Mend the task's choices.")
        with torch.inference_mode():
            logits = self._model(**inputs).logits[0, start - 1 : -1].float()
        wanted = tokens[start:]
        losses = torch.nn.functional.cross_entropy(logits, wanted)
        return (float(losses), bool((logits.argmax(-1) == wanted).all())), self._sums_of([prompt])

    def _continued(self, row: TaskRow) -> tuple[RowPrompt, str]:
        arguments = row.request.args
        if len(arguments) == 2:  # a choice by itself, without a question
            context, continuation = arguments
            return RowPrompt(context or self.processor.tokenizer.bos_token or "", []), continuation
        context, continuation, doc_to_visual, doc_id, task, split = arguments
        doc = self.task_dict[task][split][doc_id]
        if callable(continuation):
            continuation = continuation(doc)
        messages = messages_of_context(context, doc_to_visual(doc), self.processor.image_token)
        return prompt_of_messages(self.processor, messages, self.chat_template), str(continuation)


# One class for every family, found by the names that `manifests` gives.
globals().update(classes_of_families(_FromContext, "FromContext"))
