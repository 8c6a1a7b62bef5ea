"""The model registry: registers generators and promotes the best one to `champion`."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.metrics import better, metric_of
from pipeline.run_folder import TrainedGenerator
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate
from pipeline.tracking.connection import SuppressCode, bounded_requests, connect
from pipeline.tracking.logged_model import SET_TAG, SHA_TAG, LoggedGenerator, log_model
from pipeline.tracking.lookup import CHAMPION, by_alias, connect_existing, one_line_errors, resolve
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.uri import known_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
METRIC_TAG = "esrgan.metric."
SELECTED_TAG = "esrgan.selected_by"
# Set on the registered model after its first promotion: if the alias is missing later, a person removed it.
PROMOTED_TAG = "esrgan.promoted"
DESCRIPTION_CHARACTERS = 5000
# A server that stops answering fails the upload after about a minute; the largest file takes seconds.
UPLOAD_LIMITS = {"timeout_s": 30, "retries": 1}


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry, and whether it is the champion."""

    name: str
    version: int
    champion: bool
    reason: str


def register_candidate(tracked: TrackedRun, candidate: Candidate) -> RegisteredVersion:
    """Registers a run's generator, and logs the results of its earlier stages; a repetition gives the same version.

    It becomes `challenger`, and `champion` only if it is better than the current champion, which must have been chosen
    by the same metric and measured on the same evaluation set.

    Raises:
        UserError: a file is corrupt, or the server is unreachable or rejects it; run the same command again, an
            interrupted registration is completed.
    """
    description = candidate.description
    name, run = description.model_name, Storage(tracked.folder)
    with one_line_errors(f"registering {name}", tracked.uri), bounded_requests(**UPLOAD_LIMITS):
        client = connect(tracked.uri)
        for earlier in description.earlier:
            log_model(client, tracked, candidate, earlier, _content(run, earlier))
        generator = description.generator
        logged = log_model(client, tracked, candidate, generator, _content(run, generator))
        version, is_new = _version(client, tracked, candidate, logged)
        if is_new or by_alias(client, name, CHALLENGER) is None:
            client.set_registered_model_alias(name, CHALLENGER, str(version.version))
        champion, reason = _promote_if_better(client, version)
    return RegisteredVersion(name, int(version.version), champion, reason)


def promote(name: str, version: int, tracking_uri: str | None = None) -> int | None:
    """Makes `version` the champion, whatever its metrics are.

    Returns:
        The previous champion; None if there was none.

    Raises:
        UserError: no such model or version, or the server is unreachable.
    """
    uri = known_uri(tracking_uri)
    with one_line_errors(f"models:/{name}/{version}", uri), bounded_requests(timeout_s=10, retries=1):
        client = connect_existing(uri)
        previous = by_alias(client, name, CHAMPION)
        _set_champion(client, resolve(client, name, None, str(version)))
    return int(previous.version) if previous else None


def _content(run: Storage, generator: TrainedGenerator) -> bytes:
    """A generator's file. Raises UserError: missing or corrupt."""
    what = f"{run.path(generator.file)}: the generator cannot be registered"
    try:
        content = run.read_bytes(generator.file)
    except FileNotFoundError:
        raise UserError(f"{what}, its file is missing") from None
    if hashlib.sha256(content).hexdigest() != generator.sha256:
        raise UserError(f"{what}, its file is corrupt")
    return content


def _version(
    client: MlflowClient, tracked: TrackedRun, candidate: Candidate, logged: LoggedGenerator
) -> tuple[ModelVersion, bool]:
    """The version of this logged model, and whether it is new."""
    description = candidate.description
    name = description.model_name
    with SuppressCode("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(SHA_TAG) == logged.sha256 and version.run_id == tracked.run_id:
            return version, False
    model, text = logged.model, logged.description
    tags = {SHA_TAG: logged.sha256, SET_TAG: description.evaluation_set, SELECTED_TAG: description.metric}
    tags |= {f"{METRIC_TAG}{key}": repr(float(value)) for key, value in description.generator.metrics.items()}
    # MLflow's client would look up models:/ in its global tracking URI, not in this database; a server uses its own.
    by_server = tracked.uri.startswith("http")
    source = f"models:/{model.model_id}" if by_server else model.artifact_location
    shown = text if len(text) <= DESCRIPTION_CHARACTERS else text[: DESCRIPTION_CHARACTERS - 3] + "..."
    version = client.create_model_version(
        name, source, run_id=tracked.run_id, tags=tags, description=shown, model_id=model.model_id
    )
    if not by_server:
        # A server sets this tag itself; MLflow's page links the logged model and the version by it.
        link = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return version, True


def _promote_if_better(client: MlflowClient, version: ModelVersion) -> tuple[bool, str]:
    """Makes this version the champion if it is better; returns whether it is, and why (not).

    MLflow cannot set an alias conditionally. So the alias is read back after it was set: if another job has moved it in
    between, the versions are compared again. Every round compares with another champion, so the loop ends.
    """
    name, reason = version.name, "it is the champion already"
    while True:
        # One request reads alias and tag: the tag is set after the alias.
        model = client.get_registered_model(name)
        current = model.aliases.get(CHAMPION)
        if current is None and PROMOTED_TAG in model.tags:
            return False, f"the alias {CHAMPION} was removed; {_promote_hint(version)}"
        if current is not None and int(current) == int(version.version):
            return True, reason
        champion = None if current is None else client.get_model_version(name, str(current))
        better, reason = _is_better(version, champion)
        if not better:
            return False, reason
        _set_champion(client, version)


def _set_champion(client: MlflowClient, version: ModelVersion) -> None:
    client.set_registered_model_alias(version.name, CHAMPION, str(version.version))
    client.set_registered_model_tag(version.name, PROMOTED_TAG, "true")


def _is_better(version: ModelVersion, champion: ModelVersion | None) -> tuple[bool, str]:
    """Whether this version should replace the champion, and why (not)."""
    key = _selected_by(version)
    value = _value(version, key)
    if value is None:
        return False, f"it has no finite {key} to compare"
    if champion is None:
        return True, f"there was no champion; {key} {value:.4f}"
    named, other_key = f"champion version {champion.version}", _selected_by(champion)
    if metric_of(other_key) != metric_of(key):
        return False, f"{named} was chosen by {other_key} and this version by {key}; {_promote_hint(version)}"
    if champion.tags.get(SET_TAG) != version.tags.get(SET_TAG):
        return False, f"{named} was measured on other images; {_promote_hint(version)}"
    other = _value(champion, other_key)
    if other is None:
        return False, f"{named} has no {other_key} to compare; {_promote_hint(version)}"
    is_better = better(metric_of(key), value, other)
    compared = f"{key} {value:.4f} against {other:.4f} of version {champion.version}"
    return is_better, f"{'better' if is_better else 'not better'}: {compared}"


def _selected_by(version: ModelVersion) -> str:
    """The metric that chose a version, such as psnr_y or Set14/lpips."""
    return str(version.tags.get(SELECTED_TAG, "psnr_y"))


def _promote_hint(version: ModelVersion) -> str:
    name = shlex.quote(version.name)
    return f"to promote it: python jobs/promote.py --model-version {version.version} --tracking.model_name {name}"


def _value(version: ModelVersion, key: str) -> float | None:
    try:
        value = float(version.tags[f"{METRIC_TAG}{key}"])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None
