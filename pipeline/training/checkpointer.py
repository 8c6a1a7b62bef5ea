"""Saves checkpoints from the training loop: a background writer, and what happens when a write fails."""

import logging
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import StorageFull
from pipeline.model.weights import sizes_as_text
from pipeline.storage import Storage
from pipeline.tracking.spool import Record, write_segment
from pipeline.training.checkpoint import FOLDER, Checkpoint, CheckpointName, listed, write
from pipeline.training.config import TrainConfig
from pipeline.training.faults import Diverged
from pipeline.training.run_log import RunLog
from pipeline.training.snapshot import Snapshot
from pipeline.training.state import TrainState

# Longer than any local write. Meanwhile other ranks wait in a collective, and the device idles.
MAX_WAIT_S = 10.0

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time, and removes old ones.

    Use as a context manager: leaving it waits for the last write.
    """

    def __init__(self, run: Storage, keep: int, metadata: dict[str, str], first_step: int = 0) -> None:
        """
        Args:
            keep: number of newest checkpoints to keep.
            metadata: architecture of the generator, kept in its file.
            first_step: where training resumes. Newer checkpoints were skipped as corrupt; they are kept until they are
                overwritten and do not count towards `keep`.
        """
        self._run, self._keep, self._metadata = run, keep, metadata
        self._corrupt = {name for name in listed(run) if name.step > first_step}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._snapshot = Snapshot()
        self._pending: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        self._remove_incomplete()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def _copies(self, named: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Copies of the tensors on the CPU; a GPU's are copied there now, and fetched by the call."""
        if next(iter(named.values())).is_cuda:
            try:
                return self._snapshot.take(named)
            except torch.OutOfMemoryError:
                self._snapshot = Snapshot()  # No memory for a second copy: fetch at once, which takes longer.
        copied = {name: value.detach().to("cpu", copy=True) for name, value in named.items()}
        return lambda: copied

    def save(
        self,
        name: CheckpointName,
        ema: dict[str, Tensor],
        tensors: dict[str, Tensor],
        scalars: dict[str, Any],
        before: Callable[[], None],
        keep: frozenset[int],
    ) -> None:
        """Copies the tensors and writes them in the background.

        Args:
            name: the checkpoint's stage and step.
            ema, tensors, scalars: its contents, as in `Checkpoint`.
            before: called in the writer thread before the checkpoint is published.
            keep: steps whose checkpoints are kept in addition to the newest.

        Raises:
            OSError: an earlier write failed.
        """
        self.wait()
        named = {f"ema.{key}": value for key, value in ema.items()} | tensors
        copies = self._copies(named)

        def work() -> None:
            before()
            fetched = copies()
            weights = {key: fetched.pop(f"ema.{key}") for key in ema}
            try:
                write(self._run, Checkpoint(name, weights, fetched, scalars), self._metadata)
            except BaseException:
                self._run.remove(
                    name.folder
                )  # on a full disk an incomplete checkpoint would block the next attempt
                raise
            self._corrupt.discard(name)
            self._remove_old(keep | {name.step})

        self._pending = self._thread.submit(work)

    def is_writing(self, wait_s: float) -> bool:
        """Whether the current write takes longer than this."""
        return self._pending is not None and not futures.wait([self._pending], wait_s).done

    def wait(self) -> bool:
        """Waits for the current write, and raises its exception. Returns whether there was one."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        pending.result()
        return True

    def _remove_incomplete(self) -> None:
        complete = {str(name) for name in listed(self._run)}
        for name in self._run.names(FOLDER):
            if name not in complete:
                logger.warning("removing the incomplete checkpoint %s", name)
                self._run.remove(f"{FOLDER}/{name}")

    def _remove_old(self, keep: frozenset[int]) -> None:
        valid = [name for name in listed(self._run) if name not in self._corrupt]
        for name in valid[: -self._keep]:
            if name.step not in keep:
                # The manifest is removed first: a partly removed folder must not look like a corrupt checkpoint.
                self._run.remove(f"{name.folder}/manifest.json")
                self._run.remove(name.folder)


class Checkpointer:
    """Saves the training state together with the log's records since the last checkpoint.

    A failed write (a full disk, for instance) is retried with the next checkpoint, up to `faults.max_failed_saves`
    consecutive times.
    """

    def __init__(self, config: TrainConfig, run: Storage, state: TrainState, log: RunLog) -> None:
        self._config, self._run, self._state, self._log = config, run, state, log
        self._writer = CheckpointWriter(run, config.keep_checkpoints, sizes_as_text(state.ema), state.step)
        self._max_wait_s = min(MAX_WAIT_S, config.faults.collective_timeout_s / 4)
        self._best = state.stage, state.best
        """The best validations whose checkpoints were saved, and their stage."""
        self._unwritten: list[Record] = []
        """Records handed to the writer, until it has written them."""
        self._failures = 0

    def __enter__(self) -> "Checkpointer":
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._writer.__exit__(kind, *error)

    def save(self, last: bool = False) -> bool:
        """Saves the state in the background.

        If the previous write is still under way after some seconds (a slow object store), this checkpoint is skipped,
        except the `last` one of the training. Returns whether it is saved.

        Raises:
            StorageFull: `faults.max_failed_saves` was exceeded.
            Diverged: the weights of the previous checkpoint were not finite.
        """
        state = self._state
        if not last and self._writer.is_writing(self._max_wait_s):
            self._log.event(
                state.step,
                f"warning: skipped the checkpoint of step {state.step}: the previous one is still being written "
                f"to storage={self._config.storage}",
            )
            # A validation without a checkpoint cannot be the best.
            state.best = self._best[1] if self._best[0] == state.stage else ()
            return False
        self._wait(self._config.faults.max_failed_saves)
        self._best = state.stage, state.best
        records = self._unwritten = self._log.take()
        step = state.step
        self._writer.save(
            CheckpointName(step, state.stage),
            state.ema.state_dict(),
            state.tensors(),
            state.scalars(),
            before=lambda: write_segment(self._run, step, records),
            keep=frozenset({self._config.psnr.steps} | {best.step for best in state.best}),
        )
        return True

    def written(self) -> bool:
        """Waits some seconds for the current write; returns whether it has succeeded. Raises like `save`."""
        if self._writer.is_writing(self._max_wait_s):
            return False
        return self._wait(max_failures=self._config.faults.max_failed_saves)

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises like `save`, on the first failure."""
        self._wait(max_failures=0)

    def _wait(self, max_failures: int) -> bool:
        try:
            if self._writer.wait():
                self._failures = 0
        except FloatingPointError as error:
            raise Diverged(f"{error}; lower {self._state.stage}.learning_rate") from None
        except OSError as error:
            self._failures += 1
            # Points that were written before the failure are sent again unchanged, and MLflow keeps them once.
            self._log.put_back(self._unwritten)
            text = f"storage={self._config.storage}: a checkpoint could not be written ({error.strerror or error})"
            if self._failures > max_failures:
                raise StorageFull(f"{text}; free some space and start the same run again") from None
            self._log.event(self._state.step, f"warning: {text}; retrying at the next checkpoint")
        self._unwritten = []
        return self._failures == 0
