"""Saves checkpoints from the training loop in a background thread, and handles writes that fail."""

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


class Checkpointer:
    """Saves the training state together with the log's records since the last checkpoint, and removes old checkpoints.

    A background thread writes one checkpoint at a time. A failed write (a full disk, for instance) is retried with the
    next checkpoint, up to `faults.max_failed_saves` consecutive times. Use as a context manager: leaving it waits for
    the last write.
    """

    def __init__(self, config: TrainConfig, run: Storage, state: TrainState, log: RunLog) -> None:
        self._config, self._run, self._state, self._log = config, run, state, log
        # Newer checkpoints were skipped as corrupt when training resumed; they are kept until they are overwritten, and
        # do not count towards `keep_checkpoints`.
        self._corrupt = {name for name in listed(run) if name.step > state.step}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._snapshot = Snapshot()
        self._pending: Future[None] | None = None
        self._max_wait_s = min(MAX_WAIT_S, config.faults.collective_timeout_s / 4)
        self._best = state.stage, state.best
        """The best validations whose checkpoints were saved, and their stage."""
        self._unwritten: list[Record] = []
        """Records handed to the thread, until it has written them."""
        self._failures = 0

    def __enter__(self) -> "Checkpointer":
        complete = {str(name) for name in listed(self._run)}
        for name in self._run.names(FOLDER):
            if name not in complete:
                logger.warning("removing the incomplete checkpoint %s", name)
                self._run.remove(f"{FOLDER}/{name}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()

    def save(self, last: bool = False) -> bool:
        """Copies the state and writes it in the background.

        If the previous write is still under way after some seconds (a slow object store), this checkpoint is skipped,
        except the `last` one of the training. Returns whether it is saved.

        Raises:
            StorageFull: `faults.max_failed_saves` was exceeded.
            Diverged: the weights of the previous checkpoint were not finite.
        """
        state = self._state
        if not last and self._is_writing():
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
        self._unwritten = self._log.take()
        ema = {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
        self._pending = self._thread.submit(
            self._write,
            CheckpointName(state.step, state.stage),
            self._copies(ema | state.tensors()),
            state.scalars(),
            self._unwritten,
            {state.step, self._config.psnr.steps, *(best.step for best in state.best)},
        )
        return True

    def written(self) -> bool:
        """Waits some seconds for the current write; returns whether it has succeeded. Raises like `save`."""
        return not self._is_writing() and self._wait(self._config.faults.max_failed_saves)

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises like `save`, on the first failure."""
        self._wait(max_failures=0)

    def _is_writing(self) -> bool:
        return self._pending is not None and not futures.wait([self._pending], self._max_wait_s).done

    def _wait(self, max_failures: int) -> bool:
        """Waits for the current write, if there is one; returns whether the last one has succeeded."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
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

    def _copies(self, named: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Copies of the tensors on the CPU; a GPU's are copied there now, and fetched by the call."""
        if next(iter(named.values())).is_cuda:
            try:
                return self._snapshot.take(named)
            except torch.OutOfMemoryError:
                self._snapshot = Snapshot()  # No memory for a second copy: fetch at once, which takes longer.
        copied = {name: value.detach().to("cpu", copy=True) for name, value in named.items()}
        return lambda: copied

    def _write(
        self,
        name: CheckpointName,
        copies: Callable[[], dict[str, Tensor]],
        scalars: dict[str, Any],
        records: list[Record],
        keep: set[int],
    ) -> None:
        """Runs in the thread. `keep`: steps whose checkpoints are kept in addition to the newest."""
        write_segment(self._run, name.step, records)
        tensors = copies()
        ema = {key.removeprefix("ema."): tensors.pop(key) for key in [*tensors] if key.startswith("ema.")}
        try:
            write(self._run, Checkpoint(name, ema, tensors, scalars), sizes_as_text(self._state.ema))
        except BaseException:
            # On a full disk an incomplete checkpoint would block the next attempt.
            self._run.remove(name.folder)
            raise
        self._corrupt.discard(name)
        valid = [each for each in listed(self._run) if each not in self._corrupt]
        for old in valid[: -self._config.keep_checkpoints]:
            if old.step not in keep:
                # The manifest is removed first: a partly removed folder must not look like a corrupt checkpoint.
                self._run.remove(f"{old.folder}/manifest.json")
                self._run.remove(old.folder)
