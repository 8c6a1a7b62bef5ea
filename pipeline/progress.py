"""Progress of long work: a bar on a terminal, one line every ten seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0


class _Lines:
    """A stream for tqdm that prints each state of the bar as a line; redrawing would make one endless line of a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Prints what is left without the control characters of a bar."""
        if text.strip():
            print(text.strip(), file=self._stream, flush=True)

    def flush(self) -> None:
        """Each line is flushed by itself."""


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm on stderr, with its options. In a log, work of less than ten seconds prints nothing."""
    if sys.stderr.isatty():
        return tqdm(items, **options)
    if options.get("desc"):  # tqdm adds the colon to its own format only
        options["desc"] += ": "
    return tqdm(
        items, file=_Lines(sys.stderr), miniters=1, mininterval=LINE_EVERY_S, delay=LINE_EVERY_S, leave=False,
        smoothing=0, bar_format="{desc}{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left", **options,
    )  # fmt: skip
