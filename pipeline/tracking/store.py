"""The one way to an MLflow store: with short waits, one-line errors, and no global settings left behind."""

import fcntl
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError, without_secrets
from pipeline.tracking.uri import DATABASES

logger = logging.getLogger(__name__)

# MLflow reads its time-outs from the environment at every request, and nowhere else.
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The link that it prints when a run ends holds the address's password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_lock = threading.Lock()
_waits: list[dict[str, str]] = []
_before: dict[str, str | None] = {}


class StoreAway(Exception):
    """The store cannot be reached now; the message says where and why, without secrets."""


@contextmanager
def waits(timeout_s: int, retries: int) -> Iterator[None]:
    """Bounds every MLflow request inside the block; what was set before comes back after the last block.

    Blocks of several threads may overlap: the newest one's limits hold for all of them until it ends.
    """
    mine = {_TIMEOUT: str(timeout_s), _RETRIES: str(retries), **_QUIET}
    with _lock:
        if not _waits:
            _before.update({name: os.environ.get(name) for name in mine})
        _waits.append(mine)
        os.environ.update(mine)
    try:
        yield
    finally:
        with _lock:
            _waits[:] = [other for other in _waits if other is not mine]
            for name, value in (_waits[-1] if _waits else _before).items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri` that has answered once; a new database gets its tables here.

    Raises:
        StoreAway: nothing answers there, within about ten seconds.
        UserError: it answers, but cannot be used: an older schema, a missing driver, no right to enter.
    """
    try:
        _require_reachable(uri)
        with waits(timeout_s=4, retries=1), _only_migrator(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
        return client
    except ModuleNotFoundError as error:
        raise UserError(
            f"tracking.uri={without_secrets(uri)}: package {error.name} is not installed (for PostgreSQL: "
            "pip install psycopg2-binary)"
        ) from None
    except MlflowException as error:
        text = str(error)
        shown = f"tracking.uri={without_secrets(uri)}"
        if "out-of-date database schema" in text:
            raise UserError(
                f"{shown}: made by another MLflow version; make a copy, then run: "
                f"mlflow db upgrade {without_secrets(uri)}"
            ) from None
        if re.search(r"\b40[13]\b", text):
            raise UserError(
                f"{shown}: access refused ({reason(error)}); check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, and the server's --allowed-hosts"
            ) from None
        if re.search(r"\b404\b", text):
            raise UserError(f"{shown}: what answers there is not an MLflow server") from None
        raise StoreAway(f"{shown}: {reason(error)}") from None
    except Exception as error:  # Each database driver has its own errors.
        if isinstance(error, UserError | StoreAway):
            raise
        raise StoreAway(f"tracking.uri={without_secrets(uri)}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The cause in a few words, without secrets."""
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


def is_code(error: BaseException, code: str) -> bool:
    """Whether MLflow's error has this error code, such as RESOURCE_DOES_NOT_EXIST."""
    return isinstance(error, MlflowException) and error.error_code == code


def _require_reachable(uri: str) -> None:
    """Databases on a host: MLflow itself would try for minutes. Raises StoreAway."""
    scheme = uri.partition("://")[0].split("+")[0]
    if scheme == "sqlite" or scheme not in DATABASES:
        return
    parts = urlsplit(uri)
    port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[scheme]
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as error:
        raise StoreAway(f"tracking.uri={without_secrets(uri)}: {reason(error)}") from None


@contextmanager
def _only_migrator(uri: str) -> Iterator[None]:
    """One process at a time makes a SQLite file's tables: several at once destroy each other's work."""
    if not uri.startswith("sqlite:"):
        yield
        return
    file = Path(uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    # The migration talks much, on the level of information.
    talkers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [talker.level for talker in talkers]
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for talker in talkers:
            talker.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)
