"""What the loop needs to know of its surroundings, whoever made them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


def _nothing(metrics: Mapping[str, float]) -> None:
    return None


def _never() -> bool:
    return False


def _done() -> None:
    return None


@dataclass(frozen=True)
class Worker:
    """One process of a training run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Mapping[str, float]], None] = _nothing
    """Reports a validation, its metrics and its `step`, to the launcher; must be called equally often on all ranks."""
    preempted: Callable[[], bool] = _never
    """Whether this worker's machine is about to be taken away; every worker calls it equally often."""
    stopping: Callable[[], bool] = _never
    """Whether somebody asked the run to save and end; one worker that says so is enough."""
    resizing: Callable[[], bool] = _never
    """Whether the worker group will be replaced by one of another size as soon as it has saved; rank 0 is asked."""
    ready_to_resize: Callable[[], None] = _done
    """Called on rank 0 when that checkpoint is written."""
    reason: str = ""
    """Why this group of workers follows another one ("after a fault (...)"); worker 0 knows it."""

    @property
    def leads(self) -> bool:
        """Whether this worker writes files and prints."""
        return self.rank == 0
