"""The model registry: registers generators, decides about `champion`, and gives generators back."""

import atexit
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipeline.errors import UserError, without_secrets
from pipeline.model import decode_generator, generator_sha256, load_generator
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.model_files import WEIGHTS, ModelCard, card_text, write_model
from pipeline.tracking.runs import DIGEST_CHARACTERS, TrackedRun
from pipeline.tracking.store import StoreAway, connect, is_code, reason, waits
from pipeline.tracking.uri import known_uri

__all__ = [
    "ModelCard",
    "RegisteredVersion",
    "champion_version",
    "log_generator",
    "promote",
    "pull_generator",
    "register_generator",
]

CHAMPION, CHALLENGER = "champion", "challenger"
SHA_TAG, SET_TAG, METRIC_TAG = "esrgan.generator_sha256", "esrgan.evaluation_set", "esrgan.metric."
# Set on a version that beat the champion named in its value; racing jobs find each other by it.
BEAT_TAG = "esrgan.beat"
# Set on the registered model, after its first champion: one that is missing later was removed by hand.
CROWNED_TAG = "esrgan.crowned"
DESCRIPTION_CHARACTERS = 5000
# A server that stops answering is given up after about a minute; the largest file takes seconds.
UPLOAD_WAITS = {"timeout_s": 30, "retries": 1}
_URI = re.compile(
    r"^models:/(?:(?P<model_id>m-[0-9a-f]{32})|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+)))$"
)


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry, and whether it is the champion."""

    name: str
    version: int
    champion: bool
    reason: str


def register_generator(
    tracked: TrackedRun,
    config: TrackingConfig,
    generator_path: Path,
    *,
    step: int,
    metrics: Mapping[str, float],
    evaluation_set: str,
    card: ModelCard,
) -> RegisteredVersion:
    """Makes the generator a version of `config.model_name`; doing it again for the same run gives the same version.

    It becomes `challenger`, and `champion` only if `config.metric` on the same evaluation set is better than the
    present champion's.

    Args:
        tracked: the open run.
        config: the tracking section.
        generator_path: the generator's .safetensors file.
        step: the global step of its checkpoint.
        metrics: its validation metrics; they are linked with the logged model.
        evaluation_set: digest of the photographs that the metrics were measured on.
        card: where it comes from.

    Raises:
        UserError: the store is away or refuses; nothing is half-registered, run the same command again.
    """
    name = config.model_name
    with _clear_errors(f"registering {name}", tracked.uri), waits(**UPLOAD_WAITS):
        client = connect(tracked.uri)
        logged = _log_model(client, tracked, name, generator_path, step, metrics, evaluation_set, card)
        version, is_new = _version(client, tracked, name, logged, metrics, evaluation_set)
        number = int(version.version)
        if is_new or _by_alias(client, name, CHALLENGER) is None:
            client.set_registered_model_alias(name, CHALLENGER, str(number))
        champion, why = _crown_if_better(client, name, number, config.metric)
    return RegisteredVersion(name, number, champion, why)


def log_generator(
    tracked: TrackedRun,
    config: TrackingConfig,
    generator_path: Path,
    step: int,
    metrics: Mapping[str, float],
    evaluation_set: str,
    card: ModelCard,
) -> None:
    """Logs a generator with its metrics for MLflow's page to compare, without registering it.

    Arguments and errors are those of `register_generator`; doing it again changes nothing.
    """
    name = config.model_name
    with _clear_errors(f"logging the generator of step {step}", tracked.uri), waits(**UPLOAD_WAITS):
        client = connect(tracked.uri)
        _log_model(client, tracked, name, generator_path, step, metrics, evaluation_set, card)


def champion_version(name: str, tracking_uri: str | None = None) -> int | None:
    """Number of the champion; None without one. Raises UserError when the store is away."""
    uri = known_uri(tracking_uri)
    with _clear_errors(f"models:/{name}@{CHAMPION}", uri), waits(timeout_s=10, retries=1):
        found = _by_alias(_existing_store(uri), name, CHAMPION)
    return int(found.version) if found else None


def promote(name: str, version: int, tracking_uri: str | None = None) -> int | None:
    """Makes `version` the champion by hand, whatever its metrics say.

    Returns:
        The champion that it replaces; None if there was none.

    Raises:
        UserError: no such model or version, or the store is away.
    """
    uri = known_uri(tracking_uri)
    with _clear_errors(f"models:/{name}/{version}", uri), waits(timeout_s=10, retries=1):
        client = _existing_store(uri)
        _resolve(client, name, None, str(version))
        before = _by_alias(client, name, CHAMPION)
        client.set_registered_model_alias(name, CHAMPION, str(version))
        client.set_registered_model_tag(name, CROWNED_TAG, "true")
        # Contests over this champion begin anew: a version that beat it once, and was set back by hand, stays back.
        for other in _versions(client, name):
            if other.tags.get(BEAT_TAG) == str(version):
                client.delete_model_version_tag(name, str(other.version), BEAT_TAG)
    return int(before.version) if before else None


def pull_generator(uri: str, tracking_uri: str | None = None, folder: Path | None = None) -> Path:
    """Fetches a registered generator's weights.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION or models:/MODEL_ID.
        tracking_uri: the store; without it ESRGAN_TRACKING__URI, then MLFLOW_TRACKING_URI.
        folder: where to put the file; without it a folder that is removed when the process ends. A file that is on
            this machine already is used where it is.

    Returns:
        Path of generator.safetensors; its contents agree with the digest in the registry.

    Raises:
        UserError: no such model, alias or version, the store is not there, or the file is corrupt or not finite.
    """
    parts = _URI.match(uri)
    if parts is None:
        raise UserError(f"{uri}: not a registered model; write models:/NAME@{CHAMPION} or models:/NAME/3")
    store = known_uri(tracking_uri)
    with _clear_errors(uri, store), waits(timeout_s=60, retries=2):
        client = _existing_store(store)
        if parts["model_id"]:
            model = client.get_logged_model(parts["model_id"])
            location, tags = model.artifact_location, dict(model.tags)
        else:
            version = _resolve(client, parts["name"], parts["alias"], parts["version"])
            location = client.get_model_version_download_uri(parts["name"], str(version.version))
            tags = dict(version.tags)
        if folder is None and not (location.startswith(("/", "file:"))):
            folder = Path(tempfile.mkdtemp(prefix="esrgan-pulled-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/artifacts/{WEIGHTS}",
                tracking_uri=store,
                registry_uri=store,
                dst_path=str(folder) if folder else None,
            )
        except OSError as error:
            raise UserError(f"{uri}: its file {WEIGHTS} cannot be fetched ({reason(error)})") from None
    generator, _ = decode_generator(Path(path), f"{uri}: {path}")
    if tags.get(SHA_TAG) not in (None, generator_sha256(generator.state_dict())):
        raise UserError(
            f"{uri}: {path} differs from the digest in the registry; it is damaged, register it again"
        )
    return Path(path)


@dataclass(frozen=True)
class _Logged:
    """A generator among MLflow's logged models."""

    model: LoggedModel
    sha256: str
    description: str


def _log_model(
    client: MlflowClient, tracked: TrackedRun, name: str, path: Path, step: int, metrics: Mapping[str, float],
    evaluation_set: str, card: ModelCard,
) -> _Logged:  # fmt: skip
    """The logged model of this generator, new or as it was; an upload that was cut off is done again."""
    generator, _ = load_generator(path)
    sha256 = generator_sha256(generator.state_dict())
    facts = {
        "step": step,
        "run_id": tracked.run_id,
        "generator_sha256": sha256,
        **({"data": card.data} if card.data else {}),
        "data_sha256": card.data_sha256,
        "evaluation_set": evaluation_set,
    }
    text = card_text(name, card, metrics, facts)
    # MLflow's page cannot show a version's own files within its description.
    description = card_text(name, card, metrics, facts, shows_pictures=False)
    query = f"tags.`{SHA_TAG}` = '{sha256}' AND source_run_id = '{tracked.run_id}'"
    found = client.search_logged_models([tracked.experiment_id], query, max_results=1)
    model = found[0] if found else client.create_logged_model(
        tracked.experiment_id, name=f"generator-{step:08d}", source_run_id=tracked.run_id,
        tags={SHA_TAG: sha256, SET_TAG: evaluation_set}, params={"step": str(step)}, model_type="super-resolution",
    )  # fmt: skip
    if model.status == "READY":
        return _Logged(model, sha256, description)
    outputs = client.get_run(tracked.run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        # MLflow refuses to link them twice.
        client.log_outputs(tracked.run_id, [LoggedModelOutput(model.model_id, step=step)])
    identity = Model(
        artifact_path=model.artifact_location,
        run_id=tracked.run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
    )
    with tempfile.TemporaryDirectory(prefix="esrgan-model-") as folder:
        write_model(Path(folder) / "model", path, card, text, facts, identity)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
    points = [
        Metric(
            key, value, model.creation_timestamp, step, model_id=model.model_id,
            dataset_name="evaluation-set", dataset_digest=evaluation_set[:DIGEST_CHARACTERS],
        )
        for key, value in metrics.items()
    ]  # fmt: skip
    if points:
        client.log_batch(tracked.run_id, metrics=points)
    return _Logged(client.finalize_logged_model(model.model_id, "READY"), sha256, description)


def _version(
    client: MlflowClient, tracked: TrackedRun, name: str, logged: _Logged, metrics: Mapping[str, float],
    evaluation_set: str,
) -> tuple[ModelVersion, bool]:  # fmt: skip
    """The version made of this logged model, and whether it is new."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if not is_code(error, "RESOURCE_ALREADY_EXISTS"):
            raise
    for version in _versions(client, name):
        if version.tags.get(SHA_TAG) == logged.sha256 and version.run_id == tracked.run_id:
            return version, False
    model, text = logged.model, logged.description
    tags = {SHA_TAG: logged.sha256, SET_TAG: evaluation_set}
    tags |= {f"{METRIC_TAG}{key}": repr(float(value)) for key, value in metrics.items()}
    # A database store would look models:/ up in MLflow's global store, which is another one; a server knows its own.
    by_server = tracked.uri.startswith("http")
    source = f"models:/{model.model_id}" if by_server else model.artifact_location
    description = text if len(text) <= DESCRIPTION_CHARACTERS else text[: DESCRIPTION_CHARACTERS - 3] + "..."
    version = client.create_model_version(
        name, source, run_id=tracked.run_id, tags=tags, description=description, model_id=model.model_id
    )
    if not by_server:
        # A server does this by itself; MLflow's page links the logged model and the version by it.
        link = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return version, True


def _crown_if_better(client: MlflowClient, name: str, number: int, metric: str) -> tuple[bool, str]:
    """Moves `champion` to this version if it is better; of several jobs that try at once, the best one wins.

    The first version with a finite metric is crowned without a rival. Afterwards a missing champion means that somebody
    removed the alias, and no job brings it back: only `promote` does.

    MLflow has no compare-and-set for aliases. So each job first marks its version as having beaten the champion that
    it saw, then sets the alias, then looks again at all versions with the same mark and corrects the alias. Whoever
    sets the alias last has seen every mark.
    """
    # Read before the champion, as it is written after it: a job that sees the mark sees the alias too.
    crowned = CROWNED_TAG in client.get_registered_model(name).tags
    mine = client.get_model_version(name, str(number))
    champion = _by_alias(client, name, CHAMPION)
    if champion is None and crowned:
        return False, f"somebody removed the champion; {_by_hand(mine)}"
    if champion is not None and not crowned:
        client.set_registered_model_tag(name, CROWNED_TAG, "true")
    if champion is not None and int(champion.version) == number:
        return True, "it is the champion already"
    better, why = _better(mine, champion, metric)
    if not better:
        return False, why
    beaten = str(champion.version) if champion else "none"
    client.set_model_version_tag(name, str(number), BEAT_TAG, beaten)
    while True:
        contest = [
            version
            for version in _versions(client, name)
            if version.tags.get(BEAT_TAG) == beaten and _value(version, metric) is not None
            and version.tags.get(SET_TAG) == mine.tags.get(SET_TAG)
        ]  # fmt: skip
        best = max(contest, key=lambda version: (_rank(version, metric), -int(version.version)))
        now = _by_alias(client, name, CHAMPION)
        current = str(now.version) if now else "none"
        if current == str(best.version):
            break
        if current != beaten and current not in {str(version.version) for version in contest}:
            return False, f"version {current} became champion meanwhile"
        client.set_registered_model_alias(name, CHAMPION, str(best.version))
    if not crowned:
        client.set_registered_model_tag(name, CROWNED_TAG, "true")
    if int(best.version) != number:
        return False, f"version {best.version} came at the same time and is better in {metric}"
    return True, why


def _better(mine: ModelVersion, champion: ModelVersion | None, metric: str) -> tuple[bool, str]:
    """Whether this version should follow the champion, and why (not)."""
    value = _value(mine, metric)
    if value is None:
        return False, f"it has no finite {metric} (tracking.metric) to compare"
    if champion is None:
        return True, f"there was no champion; {metric} {value:.4f}"
    by_hand = _by_hand(mine)
    if champion.tags.get(SET_TAG) != mine.tags.get(SET_TAG):
        return False, f"champion version {champion.version} was measured on other photographs; {by_hand}"
    other = _value(champion, metric)
    if other is None:
        return False, f"champion version {champion.version} has no {metric} to compare; {by_hand}"
    compared = f"{metric} {value:.4f} against {other:.4f} of version {champion.version}"
    if _rank(mine, metric) > _rank(champion, metric):
        return True, f"better: {compared}"
    return False, f"not better: {compared}"


def _by_hand(version: ModelVersion) -> str:
    return f"by hand: python jobs/promote.py --model-version {version.version}"


def _value(version: ModelVersion, metric: str) -> float | None:
    try:
        value = float(version.tags[f"{METRIC_TAG}{metric}"])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _rank(version: ModelVersion, metric: str) -> float:
    """The metric turned so that more is better: distances such as LPIPS are better when small."""
    value = _value(version, metric)
    assert value is not None
    return -value if metric.startswith(("lpips", "dists", "niqe", "fid")) else value


def _by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # MLflow calls a missing alias an invalid parameter, and a missing model a missing resource.
        if is_code(error, "INVALID_PARAMETER_VALUE") or is_code(error, "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a model, with their tags."""
    versions: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def _resolve(client: MlflowClient, name: str, alias: str | None, version: str | None) -> ModelVersion:
    """The version that an alias or a number names. Raises UserError with what there is instead."""
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if not is_code(error, "RESOURCE_DOES_NOT_EXIST"):
            raise
        known = ", ".join(sorted(found.name for found in client.search_registered_models(max_results=5)))
        raise UserError(
            f"models:/{name}: there is no such registered model; known: {known or 'none'}"
        ) from None
    if alias is not None:
        found = _by_alias(client, name, alias)
        if found is None:
            known = ", ".join(sorted(model.aliases)) or "none"
            raise UserError(f"models:/{name}@{alias}: the model has no such alias; known: {known}")
        return found
    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if not is_code(error, "RESOURCE_DOES_NOT_EXIST"):
            raise
        numbers = sorted(int(found.version) for found in _versions(client, name))
        known = ", ".join(map(str, numbers[-5:])) or "none"
        raise UserError(f"models:/{name}/{version}: there is no such version; known: {known}") from None


def _existing_store(uri: str) -> MlflowClient:
    """A client of a store that must be there already: looking something up makes no new database."""
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(
            f"tracking.uri={uri}: there is no such file; give the address of the store with --tracking.uri"
        )
    return connect(uri)


@contextmanager
def _clear_errors(what: str, uri: str) -> Iterator[None]:
    """Turns what MLflow raises into one line."""
    try:
        yield
    except StoreAway as error:
        raise UserError(f"{what}: {error}") from None
    except MlflowException as error:
        raise UserError(f"{what}: refused by {without_secrets(uri)} ({reason(error)})") from None
