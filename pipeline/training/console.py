"""The log file of a sweep's trial: what its processes print."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from pipeline.storage import Storage

LOG = "log.txt"


@contextmanager
def printing_to_log(run: Storage) -> Iterator[None]:
    """Appends what this process prints to the run's log file. In an object store, the file appears at the end."""
    if run.remote:
        buffer = io.StringIO()
        try:
            with redirect_stdout(buffer), redirect_stderr(buffer):
                yield
        finally:
            run.write_bytes(LOG, buffer.getvalue().encode())
        return
    path = Path(run.path(LOG))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:  # a full disk: the training reports it
        print(f"{path}: not written ({error})", file=sys.stderr, flush=True)
        yield
        return
    with file, redirect_stdout(file), redirect_stderr(file):
        yield
