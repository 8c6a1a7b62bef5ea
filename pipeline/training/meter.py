"""Means and rates of a logging interval: losses, throughput, memory, time left."""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from pipeline.training.config import TrainConfig
from pipeline.training.distributed import sum_in_place, world_size


@dataclass
class Meter:
    """Sums scalars on the device and fetches them once per interval."""

    global_batch: int
    device: torch.device
    _names: list[str] = field(default_factory=list)
    _sums: Tensor | None = None
    _steps: int = 0
    _wait_s: float = 0.0
    _corrupt: int = 0
    _start_s: float = field(default_factory=time.perf_counter)
    _pause_s: float = 0.0

    def add(self, losses: dict[str, Tensor], wait_s: float, corrupt: int) -> None:
        """Adds one step.

        Args:
            losses: local scalars on the device; their average over workers is the value over the global batch.
            wait_s: seconds spent waiting for data.
            corrupt: corrupt patches that this worker replaced.
        """
        if self._sums is None:
            self._names = list(losses)
        # A CUDA graph overwrites its losses in every step.
        row = torch.stack([losses[name] for name in self._names]).double()
        self._sums = row if self._sums is None else self._sums.add_(row)
        self._steps += 1
        self._wait_s += wait_s
        self._corrupt += corrupt

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside (a validation) from the rates."""
        began = time.perf_counter()
        yield
        self._pause_s += time.perf_counter() - began

    def finish(self, stopping: bool = False) -> tuple[dict[str, float], bool]:
        """Ends the interval and begins the next one. All ranks call this at the same step.

        Returns:
            Means and rates of the interval, equal on all ranks except `memory_gib`; and whether any rank is stopping.
        """
        assert self._sums is not None
        names, steps = self._names, self._steps
        means = self._sums / steps
        extra = torch.tensor(
            [self._wait_s, self._corrupt, stopping], dtype=torch.float64, device=means.device
        )
        both = torch.cat([means, extra])
        sum_in_place([both])
        fetched = both.tolist()
        elapsed_s = max(time.perf_counter() - self._start_s - self._pause_s, 1e-9)
        values = {name: value / world_size() for name, value in zip(names, fetched, strict=False)}
        values["steps_per_s"] = steps / elapsed_s
        values["patches_per_s"] = steps * self.global_batch / elapsed_s
        values["data_wait_share"] = min(1.0, fetched[-3] / world_size() / elapsed_s)
        values["memory_gib"] = memory_gib(self.device)
        values["corrupt_patches"] = fetched[-2]
        self._sums, self._steps, self._wait_s, self._corrupt, self._pause_s = None, 0, 0.0, 0, 0.0
        self._start_s = time.perf_counter()
        return values, fetched[-1] > 0


def memory_gib(device: torch.device) -> float:
    """Peak GPU memory so far, or the current resident memory of this process (its peak without psutil), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import psutil
    except ModuleNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30


def progress_line(config: TrainConfig, stage: str, step: int, values: Mapping[str, float]) -> str:
    """Console progress line: step, losses, throughput, time left.

    The rate of a stage does not predict the other's, so the time left is that of the stage, and named as such.
    """
    last = config.psnr.steps + config.gan.steps
    stage_end = config.psnr.steps if stage == "psnr" else last
    left = timedelta(seconds=round((stage_end - step) / values["steps_per_s"]))
    of_stage = f" of the {stage} stage" if stage_end < last else ""
    losses = " ".join(
        f"{name.removeprefix('loss_')} {values[name]:.4g}" for name in values if name.startswith("loss_")
    )
    accuracy = values.get("discriminator_accuracy")
    accuracy_text = "" if accuracy is None else f" | D acc {accuracy:.0%}"
    return (
        f"[{stage}] step {step}/{last} | {losses}{accuracy_text} | {values['steps_per_s']:.2f} steps/s "
        f"{values['patches_per_s']:.1f} patches/s | data wait {values['data_wait_share']:.0%} | "
        f"{values['memory_gib']:.2f} GiB | {left} left{of_stage}"
    )
