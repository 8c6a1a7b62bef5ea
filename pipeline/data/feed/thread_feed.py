"""Batches for one worker from a prefetch thread; their order depends on (seed, step) alone."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from pipeline.data.feed.fetch import RawBatch, fetch_steps, opened
from pipeline.data.feed.samples import rank_share
from pipeline.data.format.local_copy import local_copy
from pipeline.data.format.manifest import load_manifest

# Prefetch depth, in steps: enough to hide a slow read; more would only take memory.
PREFETCH_STEPS = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Feed:
    """One worker's batches of any steps. Small and picklable: the data set is opened by the process that uses it."""

    root: str
    seed: int
    batch_size: int
    """Global: over all workers."""
    crop_px: int
    rank: int = 0
    world_size: int = 1
    local_cache: str | None = None
    """Folder for a copy of a remote data set on this node's disk."""

    def batches(
        self, first_step: int, last_step: int, pinned: bool = False
    ) -> Generator[RawBatch, None, None]:
        """Batches of steps first_step..last_step - 1. Closing the generator stops the prefetch.

        Args:
            first_step: the first step.
            last_step: the step after the last one.
            pinned: whether the batches are in pinned memory, for a GPU.

        Raises:
            UserError: no usable data set at `root`, a crop that does not fit it, or nearly all patches are corrupt.
        """
        yield from prefetched(self._fetched(first_step, last_step, pinned), PREFETCH_STEPS)

    def _fetched(self, first_step: int, last_step: int, pinned: bool) -> Generator[RawBatch, None, None]:
        manifest = load_manifest(local_copy(self.root, self.local_cache))
        share = rank_share(self.batch_size, self.rank, self.world_size)
        reader, samples = opened(manifest, self.seed, self.batch_size, self.crop_px)
        with closing(reader):
            yield from fetch_steps(reader, samples, range(first_step, last_step), *share, pinned=pinned)


def prefetched(items: Generator[_T, None, None], depth: int) -> Generator[_T, None, None]:
    """`items`, none of which is None, computed by a thread; at most `depth` of them wait to be consumed.

    An exception in the thread is raised here. Closing the generator ends the thread after its current item, and closes
    `items`.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        pending = deque(thread.submit(next, items, None) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, items, None))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
