"""The most memory that tensors took during a call, beyond what lay there before."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_memory(device: torch.device, function: Callable[[], Any]) -> int:
    """Bytes of tensors at the worst moment of a call, less those at its beginning.

    On CUDA by the allocator's own high-water mark. On a CPU by adding up every allocation and release that torch's allocator
    reports to its profiler: exact and the same each time, but blind to working memory that a library takes by itself.

    Args:
        device: whose memory counts.
        function: what to run; its result is dropped.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True, use_kineto=True) as profiler:
        function()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    if not peak:
        raise RuntimeError("torch's profiler reported no allocation, so memory cannot be measured with this build of torch.")
    return peak
