"""What one interval of training looked like: losses, rates, memory, time left."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
from torch import Tensor

from pipeline.training.distributed import sum_in_place, world_size


@dataclass
class Meter:
    """Collects a step's scalars on the device and fetches them once an interval."""

    global_batch: int
    device: torch.device
    _losses: list[dict[str, Tensor]] = field(default_factory=list)
    _wait_s: float = 0.0
    _damaged: int = 0
    _start_s: float = field(default_factory=time.perf_counter)
    _pause_s: float = 0.0

    def add(self, losses: dict[str, Tensor], wait_s: float, damaged: int) -> None:
        """Notes one step.

        Args:
            losses: local scalars on the device; their average over workers is the value over the global batch.
            wait_s: seconds that the step waited for data.
            damaged: damaged patches that this worker met.
        """
        self._losses.append(losses)
        self._wait_s += wait_s
        self._damaged += damaged

    def pause(self, seconds: float) -> None:
        """Takes time that is not training (a validation) out of the rates."""
        self._pause_s += seconds

    def finish(self, stopping: bool = False) -> tuple[dict[str, float], bool]:
        """Ends the interval and begins the next one. Every worker calls this at the same step.

        Args:
            stopping: whether this worker was asked to end the run.

        Returns:
            The interval's means and rates, equal on every worker but for its own memory; and whether any worker was
            asked to end the run.
        """
        names = list(self._losses[0])
        means = torch.stack(
            [torch.stack([losses[name] for losses in self._losses]).double().mean() for name in names]
        )
        extra = torch.tensor(
            [self._wait_s, self._damaged, stopping], dtype=torch.float64, device=means.device
        )
        both = torch.cat([means, extra])
        sum_in_place([both])
        fetched = both.tolist()
        steps = len(self._losses)
        elapsed_s = max(time.perf_counter() - self._start_s - self._pause_s, 1e-9)
        values = {name: value / world_size() for name, value in zip(names, fetched, strict=False)}
        values["steps_per_s"] = steps / elapsed_s
        values["patches_per_s"] = steps * self.global_batch / elapsed_s
        values["data_wait_share"] = min(1.0, fetched[-3] / world_size() / elapsed_s)
        values["memory_gib"] = memory_gib(self.device)
        values["damaged_patches"] = fetched[-2]
        self._losses, self._wait_s, self._damaged, self._pause_s = [], 0.0, 0, 0.0
        self._start_s = time.perf_counter()
        return values, fetched[-1] > 0


def memory_gib(device: torch.device) -> float:
    """The most GPU memory used so far, or this process's resident memory now, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def progress_line(stage: str, step: int, last: int, values: Mapping[str, float]) -> str:
    """One line for people: where the run is, how fast, how well, and how long it still takes."""
    left = timedelta(seconds=round((last - step) / values["steps_per_s"]))
    losses = " ".join(
        f"{name.removeprefix('loss_')} {values[name]:.4g}" for name in values if name.startswith("loss_")
    )
    accuracy = values.get("discriminator_accuracy")
    judged = "" if accuracy is None else f" | D right {accuracy:.0%}"
    return (
        f"[{stage}] step {step}/{last} | {losses}{judged} | {values['steps_per_s']:.2f} steps/s "
        f"{values['patches_per_s']:.1f} patches/s | data wait {values['data_wait_share']:.0%} | "
        f"{values['memory_gib']:.2f} GiB | {left} left"
    )
