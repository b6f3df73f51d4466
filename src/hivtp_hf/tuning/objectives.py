"""What a search maximises: how much of the unpruned model's pass is left under some settings. No right answer is needed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pruning.checked_values import checked_choice


class Objective(NamedTuple):
    """A number that says how alike two passes over a prompt are; the higher, the more.

    Attributes:
        name: for texts and options.
        meaning: in a line.
        needs_answer: whether the pass goes on over the unpruned model's own greedy answer.
        value: of the states (positions, hidden) and the logits (vocabulary,) of the unpruned pass, and those of the pruned one.
    """

    name: str
    meaning: str
    needs_answer: bool
    value: Callable[[Tensor, Tensor, Tensor, Tensor], float]


def _mean_cosine(states: Tensor, logits: Tensor, pruned_states: Tensor, pruned_logits: Tensor) -> float:
    return torch.cosine_similarity(states.double(), pruned_states.double(), dim=-1).mean().item()


def _negative_divergence(states: Tensor, logits: Tensor, pruned_states: Tensor, pruned_logits: Tensor) -> float:
    wanted, found = (of_pass.double().log_softmax(-1) for of_pass in (logits, pruned_logits))
    return -torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True).item()


STATE = "state"
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(
            STATE,
            "mean cosine of the last hidden states, unpruned and pruned, at the last token of the prompt",
            False,
            _mean_cosine,
        ),
        Objective(
            "answer",
            "mean cosine of the last hidden states, unpruned and pruned, at every token from which one of the unpruned model's "
            "greedy answer is predicted",
            True,
            _mean_cosine,
        ),
        Objective(
            "next-token",
            "minus the mean Kullback-Leibler divergence, in nats, of the next token's distribution from the unpruned one",
            False,
            _negative_divergence,
        ),
    )
}


def objective_of(name: str) -> Objective:
    """The objective called `name`; a ValueError lists the known ones."""
    return OBJECTIVES[checked_choice("objective", name, list(OBJECTIVES))]
