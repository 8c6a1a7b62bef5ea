"""Batches for one worker, in the order that (seed, step) decides, made ahead of training."""

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

from pipeline.data.feed.fetch import Batch, fetch_steps, opened
from pipeline.data.feed.samples import rank_share
from pipeline.data.format.manifest import load_manifest

# Two steps hide a slow read; more would only take memory.
AHEAD = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Feed:
    """One worker's batches of any steps. Small and picklable: it opens the data set where it is used."""

    root: str
    seed: int
    batch_size: int
    """Over all workers."""
    crop_px: int
    rank: int = 0
    world_size: int = 1

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Batches of the steps from `first_step` to before `last_step`. Close the generator to stop what makes them.

        Raises:
            UserError: no usable data set at `root`, a crop that does not fit it, or hardly a patch that is not damaged.
        """
        yield from ahead(self._made(first_step, last_step), AHEAD)

    def _made(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        manifest = load_manifest(self.root)
        share = rank_share(self.batch_size, self.rank, self.world_size)
        with opened(manifest, self.seed, self.batch_size, self.crop_px) as (reader, samples):
            yield from fetch_steps(reader, samples, range(first_step, last_step), *share)


def ahead(items: Generator[_T, None, None], depth: int) -> Generator[_T, None, None]:
    """`items`, made by a thread that has at most `depth` of them waiting.

    What the thread raises is raised here. Closing the generator ends the thread after the item that it is making, and
    closes `items`.
    """
    made: SimpleQueue[tuple[_T] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            with closing(items):
                while True:
                    room.acquire()  # before making the item: `depth` bounds what lies in memory
                    if stop.is_set():
                        return
                    try:
                        item = next(items)
                    except StopIteration:
                        break
                    made.put((item,))
            made.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            made.put(error)

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        while (got := made.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            room.release()
            yield got[0]
    finally:
        stop.set()
        room.release()
        thread.join()
