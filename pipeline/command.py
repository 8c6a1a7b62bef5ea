"""What all commands share: exit codes, flags, the result as JSON, a table."""

import argparse
import difflib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pipeline.errors import UserError, without_secrets
from pipeline.json_file import json_text
from pipeline.section import RENAMED, AnySection, validated

ENV_PREFIX = "ESRGAN_"
# Sections of commands without a configuration file; their environment variables begin with ESRGAN_EVALUATE__ etc.
COMMAND_SECTIONS = ("evaluate", "upscale", "export")
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command on the program's arguments and exits: 0, or 2 after one line about an error the user can fix.

    Any other error prints its traceback, without passwords, and exits 1. A command may return another exit code.
    """
    # Names of files need not be UTF-8.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - reported below
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            # Printed here because Python's and Ray's exception hooks would print the password of an address.
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr, flush=True)
            sys.exit(EXIT_FAULT)
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: no space left on the device{where}; free some, or choose another folder, and run the same command "
            "again to resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def announce(text: str) -> None:
    """Prints what a command does, before it imports torch and others, which takes seconds."""
    print(text, flush=True)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if "unrecognized arguments:" in message:
            flag = message.split("unrecognized arguments:")[1].split()[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the flags"
            if flag.removeprefix("--") in RENAMED:
                hint = f"; renamed to --{RENAMED[flag.removeprefix('--')]}"
        raise UserError(f"{message}{hint}")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line (UserError)."""
    return _Parser(description=description, allow_abbrev=False)


def parse_section(
    name: str,
    section: type[AnySection],
    argv: Sequence[str],
    description: str,
    environment: Mapping[str, str] | None = None,
) -> AnySection:
    """A command's section from its flags and, below these, the environment (ESRGAN_NAME__FIELD).

    The flags are generated from the fields, in their order: --field-name, or the `flag` in `json_schema_extra`, whose
    other entries are arguments of argparse. pydantic-settings generates those of the configuration file, but splits
    lists at commas, which paths may contain, and lacks `--model A B`, `--interpolate A B ALPHA` and `--metrics` without
    a value.

    Args:
        name: one of COMMAND_SECTIONS.
        section: its class.
        argv: arguments without the program's name.
        description: first line of --help.
        environment: instead of os.environ; lists are JSON.

    Raises:
        UserError: one line that names the flag and its value.
    """
    prefix = f"{ENV_PREFIX}{name.upper()}__"
    given = {
        variable[len(prefix) :].lower(): _parsed_list(variable, text) if text.startswith("[") else text
        for variable, text in (os.environ if environment is None else environment).items()
        if variable.upper().startswith(prefix)
    }
    parser = make_parser(description)
    flags = {}
    for field, info in section.model_fields.items():
        extra: Any = info.json_schema_extra or {}
        text = info.description or ""
        if info.default and not info.is_required():
            text = f"{text.removesuffix('.')} (default: {info.default})."
        options = {"help": text, "default": argparse.SUPPRESS, **extra}
        if get_origin(info.annotation) is Literal:
            options["choices"] = get_args(info.annotation)
        flags[field] = options.pop("flag", f"--{field.replace('_', '-')}")
        names = (*options.pop("aliases", ()), flags[field])
        required = info.is_required() and field not in given
        parser.add_argument(*names, dest=field, required=required, **options)
    from_flags = vars(parser.parse_args(list(argv)))
    sources = [("flag", from_flags), ("environment", given)]
    return validated(section, {**given, **from_flags}, sources, flags)


def _parsed_list(variable: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"environment: {variable}={text}: not a JSON list ({error})") from None


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
        Path(path).write_text(json_text(result), encoding="utf-8", errors="backslashreplace")


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
