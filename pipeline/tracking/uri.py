"""URIs of tracking servers and databases: made absolute, and masked wherever they are written or shown."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import MASK, UserError, without_secrets
from pipeline.storage import absolute, is_remote
from pipeline.tracking.config import TrackingConfig

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def resolve_uri(config: TrackingConfig, storage: str) -> str:
    """The absolute tracking URI; the same in every process and from every folder.

    Args:
        config: `tracking.uri`; `none` is returned unchanged, and None is mlflow.db in `storage`. A masked URI, as it is
            written to files, is replaced by the environment's.
        storage: the folder (or s3:// prefix) of the run folders.

    Raises:
        UserError: no URI for runs on s3, a folder as URI, an unknown form, a masked URI and none in the environment.
    """
    if config.uri is not None and MASK in config.uri:
        return known_uri(None)
    if config.uri == "none":
        return config.uri
    if config.uri is None:
        if is_remote(storage):
            raise UserError(
                f"tracking.uri is not set, and storage={storage} cannot hold a database; "
                "set the URI of an MLflow server, such as http://host:5000, or none"
            )
        folder = absolute(storage)
        _require_plain(folder, f"storage={storage}")
        return f"sqlite:///{folder}/mlflow.db"
    return absolute_uri(config.uri, None if is_remote(storage) else absolute(storage))


def absolute_uri(uri: str, storage: str | None = None) -> str:
    """`uri` with a relative SQLite path made absolute. Raises UserError: not a tracking URI.

    A database may be in `storage`, the folder of the run folders, which the first run creates.
    """
    scheme, colon, rest = uri.partition("://")
    dialect, shown = scheme.split("+")[0], f"tracking.uri={without_secrets(uri)}"
    if MASK in uri:
        raise UserError(f"{shown}: its password is masked; set the whole URI with ESRGAN_TRACKING__URI")
    if not colon or (scheme not in ("http", "https") and dialect not in DATABASES):
        raise UserError(
            f"{shown}: not the URI of an MLflow server; use sqlite:////absolute/path/mlflow.db, http(s)://host:port, "
            "or the address of a PostgreSQL, MySQL or MSSQL database"
        )
    if dialect == "sqlite":
        _require_plain(rest, shown)
        path = rest.removeprefix("/")
        if path in ("", ":memory:"):
            raise UserError(f"{shown}: name a file, such as sqlite:////absolute/path/mlflow.db")
        file = Path(path).expanduser().resolve()
        if file.is_dir() or not (file.parent.is_dir() or str(file.parent) == storage):
            raise UserError(f"{shown}: not a file in an existing folder; create {file.parent} first")
        return f"sqlite:///{file}"
    try:
        host = urlsplit(uri).hostname
        _ = urlsplit(uri).port
    except ValueError:
        host = None
    if not host:
        raise UserError(f"{shown}: has no host, or its port is not a number")
    return uri.rstrip("/")


def _require_plain(path: str, field: str) -> None:
    """A path in a sqlite: address is decoded by some of MLflow and not by the rest of it. Raises UserError."""
    special = next((sign for sign in "?#%" if sign in path), None)
    if special:
        raise UserError(
            f"{field}: contains {special!r}, which a SQLite database's address cannot hold; choose another folder, "
            "or set tracking.uri"
        )


def known_uri(uri: str | None) -> str:
    """The given URI, the environment's (ESRGAN_TRACKING__URI, then MLFLOW_TRACKING_URI), or the last run's.

    Raises:
        UserError: none of them, or not a tracking URI.
    """
    known = uri or os.environ.get("ESRGAN_TRACKING__URI") or os.environ.get("MLFLOW_TRACKING_URI")
    file = last_uri_file()
    if not known and file.is_file():
        known = file.read_text(encoding="utf-8").strip()
        try:
            return absolute_uri(known)
        except UserError as error:
            raise UserError(f"{error} (from {file}, written by the last training run)") from None
    if not known:
        raise UserError(
            "no tracking server is configured; set tracking.uri (--tracking.uri sqlite:////path/mlflow.db, or "
            "ESRGAN_TRACKING__URI, or MLFLOW_TRACKING_URI)"
        )
    return absolute_uri(known)


def last_uri_file() -> Path:
    """The file with the tracking URI of the last training run, below XDG_CONFIG_HOME or ~/.config."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "esrgan-ray" / "tracking_uri"


def write_last_uri(uri: str) -> Path | None:
    """Writes `last_uri_file`, the default of other commands; None if it cannot be written or has a password."""
    file = last_uri_file()
    if without_secrets(uri) != uri:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{uri}\n", encoding="utf-8")
    except OSError:
        return None
    return file


def artifact_root(uri: str, storage: str) -> str | None:
    """Absolute artifact location of a new experiment; None if the server chooses it."""
    dialect = uri.partition("://")[0].split("+")[0]
    if dialect == "sqlite":
        return str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    return f"{absolute(storage)}/mlartifacts" if dialect in DATABASES else None
