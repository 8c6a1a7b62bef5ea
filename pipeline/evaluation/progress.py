"""Says how far the work on many pictures is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LINE_EVERY_S = 10.0

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items as they come; pictures per second and the time left go to stderr.

    A bar redraws itself with carriage returns, which make one endless line of a log: where stderr is no terminal,
    there is a line every ten seconds, and none for what is done sooner.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=" images", smoothing=0.1)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            last = now
            print(progress_line(done, total, now - began), file=sys.stderr, flush=True)
        yield item


def progress_line(done: int, total: int, seconds: float) -> str:
    """Such as `12/100 images, 0.40 images/s, 0:03:40 left`."""
    left = round(seconds / done * (total - done))
    return (
        f"{done}/{total} images, {done / seconds:.2f} images/s, "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
