"""Finds and downloads registered generators."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError, require_package, without_secrets
from pipeline.model import decode_generator, generator_sha256
from pipeline.tracking.connection import SuppressCode, TrackingUnreachable, bounded_requests, cause, connect
from pipeline.tracking.logged_model import SHA_TAG, WEIGHTS
from pipeline.tracking.uri import known_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
_MODEL_ID = re.compile(r"\bm-[0-9a-f]{32}\b")
_URI = re.compile(
    r"^models:/(?:(?P<model_id>m-[0-9a-f]{32})|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+)))$"
)


@dataclass(frozen=True)
class PulledGenerator:
    """A registered generator on this machine, and its origin."""

    path: Path
    """Its .safetensors file; the contents match the digest in the registry."""
    version: str
    """models:/NAME/VERSION; empty for a logged model that is not registered."""
    model_id: str
    """MLflow's id of the logged model; may be empty."""
    run_id: str
    """MLflow's id of the run that made it; may be empty."""


def pull_generator(uri: str, tracking_uri: str | None = None) -> Path:
    """`pull_with_origin`, for the path alone."""
    return pull_with_origin(uri, tracking_uri).path


def pull_with_origin(uri: str, tracking_uri: str | None = None) -> PulledGenerator:
    """Downloads a registered generator's weights, to a folder that is removed when the process ends.

    A file that is on this machine already is not copied.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION or models:/MODEL_ID.
        tracking_uri: the tracking server; without it ESRGAN_TRACKING__URI, then MLFLOW_TRACKING_URI.

    Raises:
        UserError: no such model, alias or version, the server is unreachable, or the file is corrupt or not finite.
    """
    with _located(uri, tracking_uri) as (location, tags, origin):
        path = _download(uri, location, f"artifacts/{WEIGHTS}", tracking_uri)
    generator, _ = decode_generator(path, f"{uri}: {path}")
    if tags.get(SHA_TAG) not in (None, generator_sha256(generator.state_dict())):
        raise UserError(
            f"{uri}: {path} is corrupt: it differs from the digest in the registry; register it again"
        )
    return PulledGenerator(path, *origin)


@dataclass(frozen=True)
class RegisteredCard:
    """The model card of a registered generator."""

    text: str
    """In Markdown."""
    origin: Mapping[str, Any]
    """Its facts: step, data and digests."""
    config: Mapping[str, Any]
    """The whole configuration."""


def pull_card(uri: str, tracking_uri: str | None = None) -> RegisteredCard:
    """Downloads a registered generator's model card; arguments and errors are those of `pull_generator`."""
    with _located(uri, tracking_uri) as (location, _, _):
        text, model, config = (
            _download(uri, location, name, tracking_uri).read_text(encoding="utf-8")
            for name in ("README.md", "MLmodel", "config.yaml")
        )
    return RegisteredCard(text, yaml.safe_load(model).get("metadata") or {}, yaml.safe_load(config) or {})


@contextmanager
def _located(
    uri: str, tracking_uri: str | None
) -> Iterator[tuple[str, dict[str, str], tuple[str, str, str]]]:
    """Where a registered model's files are, its tags, and its version, model and run as in `PulledGenerator`.

    MLflow's errors inside are UserErrors of one line.
    """
    parts = _URI.match(uri)
    if parts is None:
        raise UserError(f"{uri}: not a registered model; write models:/NAME@{CHAMPION} or models:/NAME/3")
    server = known_uri(tracking_uri)
    with one_line_errors(uri, server), bounded_requests(timeout_s=60, retries=2):
        client = connect_existing(server)
        if parts["model_id"]:
            model = client.get_logged_model(parts["model_id"])
            origin = ("", model.model_id, model.source_run_id or "")
            yield model.artifact_location, dict(model.tags), origin
        else:
            version = resolve(client, parts["name"], parts["alias"], parts["version"])
            location = client.get_model_version_download_uri(parts["name"], str(version.version))
            # A database returns versions without model_id; the source contains it.
            found = _MODEL_ID.search(version.source or "")
            model_id = version.model_id or (found[0] if found else "")
            registered = f"models:/{parts['name']}/{version.version}"
            yield location, dict(version.tags), (registered, model_id, version.run_id or "")


def _download(uri: str, location: str, name: str, tracking_uri: str | None) -> Path:
    """A file of the registered model `uri` on this machine."""
    import mlflow.artifacts

    folder = None
    if not location.startswith(("/", "file:")):
        folder = tempfile.mkdtemp(prefix="esrgan-pulled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = known_uri(tracking_uri)
    try:
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{location.rstrip('/')}/{name}",
            tracking_uri=server,
            registry_uri=server,
            dst_path=folder,
        )
    except OSError as error:
        raise UserError(f"{uri}: its file {Path(name).name} cannot be downloaded ({cause(error)})") from None
    return Path(path)


def version_uri(uri: str, tracking_uri: str | None = None) -> str:
    """models:/NAME/VERSION of models:/NAME@ALIAS, which may move; other addresses are returned unchanged.

    Raises:
        UserError: no such model or alias, or the server is unreachable.
    """
    if "@" not in uri:
        return uri
    with _located(uri, tracking_uri) as (_, _, (version, _, _)):
        return version


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with this alias; None without one."""
    # MLflow reports a missing alias as an invalid parameter, a missing model as a missing resource.
    with SuppressCode("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
        return client.get_model_version_by_alias(name, alias)
    return None


def resolve(client: MlflowClient, name: str, alias: str | None, version: str | None) -> ModelVersion:
    """The version of an alias or number. Raises UserError that lists the existing ones."""
    model = None
    with SuppressCode("RESOURCE_DOES_NOT_EXIST"):
        model = client.get_registered_model(name)
    if model is None:
        known = ", ".join(sorted(other.name for other in client.search_registered_models(max_results=5)))
        raise UserError(f"models:/{name}: no such registered model; known: {known or 'none'}")
    if alias is not None:
        aliased = by_alias(client, name, alias)
        if aliased is None:
            known = ", ".join(sorted(model.aliases)) or "none"
            raise UserError(f"models:/{name}@{alias}: no such alias; known: {known}")
        return aliased
    with SuppressCode("RESOURCE_DOES_NOT_EXIST"):
        return client.get_model_version(name, str(version))
    found = client.search_model_versions(f"name = '{name}'")
    numbers = sorted(int(other.version) for other in found)
    known = ", ".join(map(str, numbers[-5:])) or "none"
    raise UserError(f"models:/{name}/{version}: no such version; known: {known}")


def connect_existing(uri: str) -> MlflowClient:
    """A client for reading: a missing SQLite file is an error, and is not created."""
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"tracking.uri={uri}: no such file; set the tracking server with --tracking.uri")
    return connect(uri)


@contextmanager
def one_line_errors(what: str, uri: str) -> Iterator[None]:
    """Turns MLflow's exceptions into UserErrors of one line."""
    require_package("mlflow", what, "give the path of a file or folder")
    from mlflow.exceptions import MlflowException

    try:
        yield
    except TrackingUnreachable as error:
        raise UserError(f"{what}: {error}") from None
    except MlflowException as error:
        raise UserError(f"{what}: rejected by {without_secrets(uri)} ({cause(error)})") from None
