"""Seconds by section of one run, on the device's own clock where it has one."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

TOTAL = "total"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the seconds of named sections.

    On CUDA a section is the time between two events on the stream, so that measuring it makes nobody wait; where the device
    waits for Python meanwhile, that is in it. `TOTAL` is wall-clock time with the device idle before and after.

    Args:
        device: that the sections run on.
        clock: of what runs on the CPU, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self._clock = device, clock
        self._marks: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times its body. Sections may lie in one another, and each counts by itself."""
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((name, start, self._mark()))

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, as a section."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return timed

    def run(self, function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What `function` returns, and the seconds of every section that it came through, with `TOTAL`."""
        self._marks.clear()
        synchronize(self.device)
        start = self._clock()
        result = function()
        synchronize(self.device)
        seconds = {TOTAL: self._clock() - start}
        for name, begin, end in self._marks:
            lasted = begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
            seconds[name] = seconds.get(name, 0.0) + lasted
        return result, seconds
