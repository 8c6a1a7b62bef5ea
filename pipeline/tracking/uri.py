"""Addresses of tracking stores: one absolute form, and no password in anything that is written or shown."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import MASK, UserError, without_secrets
from pipeline.storage import absolute, is_remote
from pipeline.tracking.config import TrackingConfig

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def resolve_uri(config: TrackingConfig, storage: str) -> str:
    """The one absolute address of the store; the same in every process and from every folder.

    Args:
        config: `tracking.uri`, or none for mlflow.db in `storage`. The form that is written to files, without its
            password, stands for the address that the environment gives.
        storage: the folder (or s3:// prefix) of the run folders.

    Raises:
        UserError: no address for runs on s3, a folder as address, an unknown form, a password that was removed.
    """
    if config.uri is not None and MASK in config.uri:
        return known_uri(None)
    if config.uri is None:
        if is_remote(storage):
            raise UserError(
                f"tracking.uri is not set, and storage={storage} cannot hold a database; "
                "give the address of an MLflow server, such as http://host:5000"
            )
        return f"sqlite:///{absolute(storage)}/mlflow.db"
    return absolute_uri(config.uri, None if is_remote(storage) else absolute(storage))


def absolute_uri(uri: str, storage: str | None = None) -> str:
    """`uri` with a relative SQLite path made absolute.

    Args:
        uri: as the user gave it.
        storage: the folder of the run folders, which the first run makes; a database may be in it before that.

    Raises:
        UserError: no tracking store.
    """
    scheme, colon, rest = uri.partition("://")
    dialect = scheme.split("+")[0]
    shown = without_secrets(uri)
    if MASK in uri:
        raise UserError(
            f"tracking.uri={shown}: its password was removed before it was written; give the whole address with "
            "ESRGAN_TRACKING__URI"
        )
    if not colon or dialect == "file":
        raise UserError(
            f"tracking.uri={shown}: not an address of an MLflow store; use sqlite:////absolute/path/mlflow.db or "
            "http://host:port"
        )
    if dialect == "sqlite":
        path = rest.removeprefix("/").split("?")[0]
        if path in ("", ":memory:"):
            raise UserError(f"tracking.uri={shown}: name a file, such as sqlite:////absolute/path/mlflow.db")
        file = Path(path).expanduser().resolve()
        if file.is_dir() or not (file.parent.is_dir() or str(file.parent) == storage):
            raise UserError(
                f"tracking.uri={shown}: not a file in an existing folder; create {file.parent} first"
            )
        return f"sqlite:///{file}"
    try:
        host = urlsplit(uri).hostname
        _ = urlsplit(uri).port
    except ValueError:
        host = None
    if scheme not in ("http", "https") and dialect not in DATABASES:
        raise UserError(
            f"tracking.uri={shown}: {scheme}:// is not supported; use sqlite, postgresql, mysql, http or https"
        )
    if not host:
        raise UserError(f"tracking.uri={shown}: names no host, or its port is no number")
    return uri.rstrip("/")


def known_uri(uri: str | None, environment: Mapping[str, str] | None = None) -> str:
    """A given address, or the environment's: ESRGAN_TRACKING__URI, then MLFLOW_TRACKING_URI. Raises UserError."""
    environment = os.environ if environment is None else environment
    found = uri or environment.get("ESRGAN_TRACKING__URI") or environment.get("MLFLOW_TRACKING_URI")
    if not found:
        raise UserError(
            "no tracking store is known; set tracking.uri (--tracking.uri sqlite:////path/mlflow.db, or "
            "ESRGAN_TRACKING__URI, or MLFLOW_TRACKING_URI)"
        )
    return absolute_uri(found)


def artifact_root(uri: str, storage: str) -> str | None:
    """Where a new experiment keeps its files: absolute, or None where a server decides."""
    dialect = uri.partition("://")[0].split("+")[0]
    if dialect == "sqlite":
        return str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    return f"{absolute(storage)}/mlartifacts" if dialect in DATABASES else None
