"""Connects to the MLflow tracking server (or database) with bounded timeouts and one-line errors."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.errors import UserError, require_package, without_secrets
from pipeline.tracking.relocation import follow_moved_database
from pipeline.tracking.uri import DATABASES

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads its timeouts from the environment at every request, and from nowhere else.
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The link that MLflow prints when a run ends contains the URI's password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Of the first request: an answer, or an error, within about ten seconds.
CONNECT_LIMITS = {"timeout_s": 4, "retries": 1}
_lock = threading.Lock()
_active: list[dict[str, str]] = []
_before: dict[str, str | None] = {}


class TrackingUnreachable(Exception):
    """The tracking server is unreachable; the message has the URI without secrets, and the cause."""


@contextmanager
def bounded_requests(timeout_s: int, retries: int) -> Iterator[None]:
    """Bounds every MLflow request inside the block; the environment is restored after the last block.

    Blocks of several threads may overlap: the newest one's limits apply to all of them until it ends.
    """
    limits = {_TIMEOUT: str(timeout_s), _RETRIES: str(retries), **_QUIET}
    with _lock:
        if not _active:
            _before.update({name: os.environ.get(name) for name in limits})
        _active.append(limits)
        os.environ.update(limits)
    try:
        yield
    finally:
        with _lock:
            _active[:] = [other for other in _active if other is not limits]
            for name, value in (_active[-1] if _active else _before).items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def connect(uri: str) -> MlflowClient:
    """A client whose server has answered one request; a new database gets its tables here.

    Raises:
        TrackingUnreachable: no answer within about ten seconds.
        UserError: it answers, but cannot be used: an older schema, a missing driver, access denied.
    """
    shown = f"tracking.uri={without_secrets(uri)}"
    require_package("mlflow", shown, "set tracking.uri=none")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        _require_reachable(uri)
        with bounded_requests(**CONNECT_LIMITS), _migration_lock(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
            follow_moved_database(uri)
        return client
    except ModuleNotFoundError as error:
        raise UserError(
            f"{shown}: package {error.name} is not installed (for PostgreSQL: pip install psycopg2-binary)"
        ) from None
    except (UserError, TrackingUnreachable):
        raise
    except Exception as error:  # noqa: BLE001 - each database driver has its own exceptions
        text = str(error) if isinstance(error, MlflowException) else ""
        if "out-of-date database schema" in text:
            raise UserError(
                f"{shown}: created by another MLflow version; make a copy, then run: "
                f"mlflow db upgrade {without_secrets(uri)}"
            ) from None
        if re.search(r"\b40[13]\b", text):
            raise UserError(
                f"{shown}: access denied ({cause(error)}); check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, and the server's --allowed-hosts"
            ) from None
        if re.search(r"\b404\b", text):
            raise UserError(f"{shown}: the server that answers is not an MLflow server") from None
        raise TrackingUnreachable(f"{shown}: {cause(error)}") from None


def cause(error: BaseException) -> str:
    """The cause of an error in a few words, without secrets."""
    text = str(error)
    for pattern, words in (
        (r"(?i)connection refused", "connection refused"),
        (r"(?i)timed? ?out", "no answer in time"),
        (r"(?i)name or service not known|name resolution|getaddrinfo|nodename nor", "unknown host"),
        (r"(?i)database is locked", "the database is locked"),
        (r"(?i)no space left|database or disk is full", "no space left on the disk"),
    ):
        if re.search(pattern, text):
            return words
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    return without_secrets(line)[:160]


def has_code(error: BaseException, code: str) -> bool:
    """Whether an exception is MLflow's with this error code, such as RESOURCE_DOES_NOT_EXIST."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == code


class SuppressCode:
    """A context that suppresses MLflow's errors with these codes."""

    def __init__(self, *codes: str) -> None:
        self._codes = codes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return error is not None and any(has_code(error, code) for code in self._codes)


def _require_reachable(uri: str) -> None:
    """Probes a database's host: MLflow itself would retry for minutes. Raises TrackingUnreachable."""
    scheme = uri.partition("://")[0].split("+")[0]
    if scheme == "sqlite" or scheme not in DATABASES:
        return
    parts = urlsplit(uri)
    port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[scheme]
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        raise TrackingUnreachable(f"tracking.uri={without_secrets(uri)}: {cause(error)}") from None


@contextmanager
def _migration_lock(uri: str) -> Iterator[None]:
    """Lets one process at a time create a SQLite file's tables: concurrent migrations fail."""
    if not uri.startswith("sqlite:"):
        yield
        return
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Alembic logs verbosely at INFO.
    verbose = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [each.level for each in verbose]
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for each in verbose:
            each.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for each, level in zip(verbose, levels, strict=True):
                each.setLevel(level)
