"""Training in bfloat16 with float32 master weights: faster than float32 where the processor has instructions for it."""

from collections.abc import Iterable

import torch
from torch import nn


class MasterWeights:
    """AdamW on float32 copies of parameters, which may be of another dtype.

    Args:
        modules: whose parameters are trained.
        learning_rate: at its height; `step` takes a factor.
        weight_decay: of matrices; vectors have none.
    """

    def __init__(self, modules: Iterable[nn.Module], learning_rate: float, weight_decay: float = 0.01):
        parameters = (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
        self._parameters = list(dict.fromkeys(parameters))
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        decayed = [master for master in self._masters if master.ndim > 1]
        others = [master for master in self._masters if master.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
        self._learning_rate = learning_rate

    def step(self, factor: float, most_norm: float = 1.0) -> None:
        """One step on the gradients that lie on the parameters, which are dropped."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, most_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self._learning_rate
        self._optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)

    def state_dict(self) -> dict:
        """Everything that `load_state_dict` goes on from; not a copy, so to be stored before the next step."""
        return {"masters": self._masters, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Goes on from a stored state."""
        for parameter, master, stored in zip(self._parameters, self._masters, state["masters"], strict=True):
            master.copy_(stored)
            parameter.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
