"""The models for tasks that write messages, which lmms-eval makes of every task that generates."""

from typing import Any

from lmms_eval.protocol import ChatMessages

from .pruned_lmms import PrunedLmms, TaskRow, classes_of_families
from .run_failure import RunFailure


class _FromMessages(PrunedLmms):
    is_simple = False

    def _messages(self, row: TaskRow) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = row.request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return ChatMessages(messages=messages).to_hf_messages()

    def _generation_kwargs(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return arguments[2]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """lmms-eval asks this of models that read a context."""
        raise RunFailure("tasks that score choices need `--force_simple`.")


# One class for every family, found by the names that `manifests` gives.
globals().update(classes_of_families(_FromMessages, "FromMessages"))
