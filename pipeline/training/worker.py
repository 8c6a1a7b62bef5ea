"""Runtime context of one worker: rank, device, callbacks of the launcher."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Worker:
    """One process of a training run, as its launcher describes it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Mapping[str, float]], None] = lambda metrics: None
    """Reports a validation, its metrics and its `step`, to the launcher; must be called equally often on all ranks."""
    preempted: Callable[[], bool] = lambda: False
    """Whether this worker's node is about to be preempted; must be called the same number of times on every rank."""
    stopping: Callable[[], bool] = lambda: False
    """Whether a graceful stop was requested; one rank that returns True is enough."""
    resizing: Callable[[], bool] = lambda: False
    """Whether the worker group is to be resized after its next checkpoint; called on rank 0 only."""
    ready_to_resize: Callable[[], None] = lambda: None
    """Called on rank 0 when that checkpoint has been written."""
    reason: str = ""
    """Why this worker group was restarted, such as "after a fault (...)"; set on rank 0."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), which writes files and prints."""
        return self.rank == 0
