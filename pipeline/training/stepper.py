"""Runs training steps: on the CPU, and with several workers, operation by operation; on one GPU as a CUDA graph.

A step launches thousands of short kernels, which takes the host longer than the GPU needs to run them. The graph of a
whole step (both networks, their optimizers and the EMA weights) is captured once in each stage and then launched as a
whole. What changes from step to step, the batch and the learning rate, is in fixed tensors that are filled before.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.data.feed import RawBatch
from pipeline.training.batches import on_device
from pipeline.training.config import TrainConfig
from pipeline.training.schedule import stage_rate
from pipeline.training.state import TrainState
from pipeline.training.step import Batch, gan_step, psnr_step
from pipeline.training.worker import Worker

# Steps that may wait on the device. Without a limit the host would run ahead to the end of the logging interval:
# batches would accumulate, and its time of waiting for them would not be the device's.
QUEUED_STEPS = 2
# Steps before the capture: cuDNN chooses its algorithms, Triton compiles, and optimizers create their state in them.
WARMUP_STEPS = 3


class Stepper:
    """One training step of the current stage at each call; `features` (perceptual loss) on the worker's device."""

    def __init__(self, config: TrainConfig, worker: Worker, features: nn.Module | None) -> None:
        self._config = config
        self._worker = worker
        self._features = features
        self._captures = (
            worker.device.type == "cuda" and worker.world_size == 1 and config.cuda_graph == "auto"
        )
        self._stage: str | None = None
        self._done = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._losses: dict[str, Tensor] = {}
        if worker.device.type == "cuda":
            self._rate = torch.zeros((), device=worker.device)
            # DistributedDataParallel's hooks belong to the stream on which it was built.
            self._stream = (
                torch.cuda.Stream(worker.device)
                if self._captures
                else torch.cuda.current_stream(worker.device)
            )
            self._ends: deque[torch.cuda.Event] = deque()
            self._copies = torch.cuda.Stream(worker.device)

    def __call__(self, state: TrainState, raw: RawBatch) -> tuple[dict[str, Tensor], float]:
        """Does the step `state.step`; waits only for the end of the step before the previous one.

        Returns:
            The step's scalars on the device, overwritten by the next call, and the learning rate.
        """
        rate = stage_rate(self._config, state.stage, state.step)
        if self._worker.device.type != "cuda":
            batch = on_device(raw, self._config, self._worker, state.step)
            return self._step(state, batch, rate), rate
        if len(self._ends) == QUEUED_STEPS:
            self._ends.popleft().synchronize()
        with torch.cuda.stream(self._copies):
            batch = on_device(raw, self._config, self._worker, state.step)
        self._stream.wait_stream(self._copies)
        self._stream.wait_stream(torch.cuda.current_stream())
        if self._stage != state.stage:
            self._stage, self._done, self._graph = state.stage, 0, None
        with torch.cuda.stream(self._stream), _tuned(self._config):
            self._rate.fill_(rate)
            losses = self._on_stream(state, batch)
        for images in (batch.lr, batch.hr):
            images.record_stream(self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)
        end = torch.cuda.Event()
        end.record(self._stream)
        self._ends.append(end)
        return losses, rate

    def _on_stream(self, state: TrainState, batch: Batch) -> dict[str, Tensor]:
        if self._graph is None and (not self._captures or self._done < WARMUP_STEPS):
            self._done += 1
            return self._step(state, batch, self._rate)
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.lr.copy_(batch.lr)
            self._batch.hr.copy_(batch.hr)
        if self._graph is None:
            # Capturing runs nothing. Other threads (feed, checkpoints) may use the device meanwhile.
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._losses = self._step(state, self._batch, self._rate)
        self._graph.replay()
        return self._losses

    def _step(self, state: TrainState, batch: Batch, rate: float | Tensor) -> dict[str, Tensor]:
        if state.stage == "psnr":
            return psnr_step(state, batch, self._config, rate)
        return gan_step(state, batch, self._features, self._config, rate)


@contextmanager
def _tuned(config: TrainConfig) -> Iterator[None]:
    """cuDNN tries its algorithms for the step's fixed shapes; not for validation, whose shapes vary."""
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
