"""`Processes`: those that `accelerate launch` started for one run. What one has all can get, and where one fails all stop.

They talk by gloo whatever device they compute on: little is said, and several may share a device.
"""

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.environment import parse_flag_from_env

Result = TypeVar("Result")

# A process may wait as long as another one loads a model or works through a part. One that dies, the launcher notices.
_PATIENCE = datetime.timedelta(days=7)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return not _are_several() or int(os.environ.get("RANK", 0)) == 0


def _are_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


class Processes:
    """The processes of a run: one, unless `accelerate launch` started several.

    Args:
        device: "auto" for what is this process's share of the devices, or a device of torch.

    Attributes:
        number: how many there are.
        index: of this one, from 0.
        device: "auto" where there is one process, else a device of torch.
    """

    def __init__(self, device: str):
        self.number, self.index, self.device = 1, 0, device
        if _are_several():
            asked_for_cpu = device == "auto" and parse_flag_from_env("ACCELERATE_USE_CPU")
            on_cpu = asked_for_cpu or device == "cpu" or not torch.cuda.is_available()
            state = PartialState(cpu=on_cpu, backend="gloo", timeout=_PATIENCE)
            self.number, self.index = state.num_processes, state.process_index
            if device == "auto":
                self.device = str(state.device)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def agreed(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in this process, once all have done theirs.

        Raises:
            Exception: in all processes where the work of one fails; in that one the error itself, else one that says the same.
        """
        (result, _) = self._met(work, is_shared=False)
        return result

    def gathered(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns in every process, in their order; picklable. Raises as `agreed`."""
        (_, results) = self._met(work, is_shared=True)
        return results

    def from_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns in the main process, where alone it is done; picklable. Raises as `agreed`."""
        return self.gathered(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def _met(self, work: Callable[[], Result], is_shared: bool) -> tuple[Any, list[Any]]:
        if self.number == 1:
            alone = work()
            return alone, [alone]
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # which the others must hear of, or they would wait for this one
            failure = error
        told = None if failure is None else (isinstance(failure, ValueError), f"{failure}")
        # Each says a list of one, and gets one of all.
        outcomes = gather_object([(result if is_shared else None, told)])
        if failure is not None:
            raise failure
        for _, of_other in outcomes:
            if of_other is not None:
                is_value_error, text = of_other
                raise (ValueError if is_value_error else RuntimeError)(text)
        return result, [shared for shared, _ in outcomes]
