"""Progress of long work: a bar on a terminal, one line every ten seconds in a log."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

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


class _NoBar:
    """What the callers use of tqdm, where it is not installed."""

    n = 0.0

    def __init__(self, items: Iterable[Any] | None) -> None:
        self._items = items or ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: float = 1) -> None:
        """Counts."""
        self.n += count


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm (if installed) on stderr, with its options. In a log, work of less than ten seconds prints nothing."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar(items)
    if sys.stderr.isatty():
        return tqdm(items, **options)
    if options.get("desc"):  # tqdm adds the colon to its own format only
        options["desc"] += ": "
    return tqdm(
        items, file=_Lines(sys.stderr), miniters=1, mininterval=LINE_EVERY_S, delay=LINE_EVERY_S, leave=False,
        smoothing=0, bar_format="{desc}{n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left", **options,
    )  # fmt: skip
