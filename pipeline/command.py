"""What all commands do alike: exit codes, the result as JSON, a table."""

import errno
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, without_secrets

EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command on the program's arguments and exits: 0, or 2 after one clear line about what the user can mend.

    Anything else that goes wrong keeps its traceback, without passwords, and exits 1. A command may return another
    exit code.
    """
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - reported below
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            # Printed here: Python's own way, and Ray's, would show the password of an address.
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr, flush=True)
            sys.exit(EXIT_FAULT)
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: no space left on the device{where}; free some, or choose another place, and run the same command "
            "again: it goes on",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def require_writable_file(path: str | None, flag: str) -> None:
    """Checks before the work that `path` can be written after it. Raises UserError."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"{flag} {path}: not a file in an existing folder")


def write_json(path: str | None, result: Any) -> None:
    """Writes `result` as one JSON object to `path`, if there is one; non-finite numbers become null."""
    if path is not None:
        text = json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with non-finite numbers replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; the first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width)
                  for index, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
