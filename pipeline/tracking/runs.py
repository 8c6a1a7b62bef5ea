"""Opens, resumes and ends the MLflow run of a training run."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError, without_secrets
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.facts import code_and_machine
from pipeline.tracking.records import FOLDER
from pipeline.tracking.store import StoreAway, connect, is_code, reason, waits
from pipeline.tracking.uri import artifact_root, resolve_uri

KEY_TAG = "esrgan.key"
DATA_TAG = "esrgan.data"
FILE = f"{FOLDER}/run.json"
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
PARAM_CHARACTERS = 6000  # MLflow refuses longer values,
TAG_CHARACTERS = 8000  # and longer tags,
DIGEST_CHARACTERS = 36  # and longer data set digests.
PARAMS_IN_A_CALL = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """A run that is open in MLflow."""

    uri: str = field(repr=False)
    """Absolute address of the store; may hold a password, so it is not shown."""
    run_id: str
    experiment_id: str
    folder: str
    """The run's own folder, where its spool is."""


@dataclass(frozen=True)
class RunDescription:
    """All that is needed to open the run in MLflow at any later time; kept beside the spool, without secrets."""

    experiment: str
    uri: str
    run_name: str
    parameters: dict[str, str]
    tags: dict[str, str]
    config_text: str
    parent_run_id: str | None = None
    run_id: str | None = None
    status: str = "RUNNING"
    started_ms: int | None = None
    """When it was submitted first, which may be long before the store hears of it."""
    ended_ms: int | None = None

    def save(self, run: Storage) -> None:
        """Writes it into the run's folder. Raises OSError."""
        run.write_bytes(FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())

    @staticmethod
    def load(run: Storage) -> "RunDescription":
        """Reads it. Raises UserError when the folder holds no run, or no readable one."""
        try:
            return RunDescription(**json.loads(run.read_bytes(FILE)))
        except FileNotFoundError:
            raise UserError(f"{run.uri}: not the folder of a run ({FILE} is missing)") from None
        except (ValueError, TypeError):
            raise UserError(
                f"{run.path(FILE)}: damaged; start the training again with this run name"
            ) from None


def require_store(config: TrackingConfig, storage: str) -> None:
    """Checks the store before anything expensive begins; a new database gets its tables.

    Raises:
        UserError: the address is wrong, or nothing answers there and `tracking.if_away` is `refuse`.
    """
    uri = resolve_uri(config, storage)
    try:
        connect(uri)
    except StoreAway as error:
        if config.if_away == "refuse":
            raise UserError(_refusal(error)) from None
        logger.warning("%s; training begins without it, and sends its metrics later", error)


def open_run(
    config: TrackingConfig,
    run: Storage,
    *,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    config_text: str,
    parent_run_id: str | None = None,
    run_id: str | None = None,
) -> TrackedRun | None:
    """Opens the run in MLflow, or the same one again. Called in the driver, never in a worker.

    Args:
        config: the tracking section.
        run: the run's folder; its parent is the storage.
        run_name: shown in MLflow.
        parameters: flat configuration; what MLflow has from an earlier try stays, changes become a tag.
        tags: `esrgan.key` finds the run again; `esrgan.data` (the manifest's sha256) becomes its data set.
        config_text: the whole configuration, kept as config.yaml.
        parent_run_id: the MLflow run of the sweep that this one belongs to.
        run_id: MLflow's id from an earlier try, if known.

    Returns:
        The open run; None when the store is away and `tracking.if_away` is `spool`.

    Raises:
        UserError: the store is away and `tracking.if_away` is `refuse`, or it refuses the run.
    """
    uri = resolve_uri(config, _storage_of(run))
    description = RunDescription(
        experiment=config.experiment,
        uri=without_secrets(uri),
        run_name=run_name,
        parameters={key: _shown(value, PARAM_CHARACTERS) for key, value in parameters.items()},
        tags={key: _shown(value, TAG_CHARACTERS) for key, value in {**code_and_machine(), **tags}.items()},
        config_text=without_secrets(config_text),
        parent_run_id=parent_run_id,
        run_id=run_id,
        started_ms=_first_start_ms(run),
    )
    description.save(run)
    try:
        return open_described(run, uri)
    except StoreAway as error:
        if config.if_away == "refuse":
            raise UserError(_refusal(error)) from None
        logger.warning("%s; metrics wait in %s and are sent later", error, run.path(FOLDER))
        return None


def open_described(run: Storage, uri: str) -> TrackedRun:
    """Opens the run that the folder describes, now or long after it was trained.

    Raises:
        StoreAway: nothing answers.
        UserError: the store refuses the run.
    """
    description = RunDescription.load(run)
    client = connect(uri)
    try:
        with waits(timeout_s=10, retries=1):
            experiment_id = _experiment(client, description.experiment, artifact_root(uri, _storage_of(run)))
            run_id = _find(client, description, experiment_id) or _create(client, description, experiment_id)
            # From here on a crash finds the run again by its key.
            _describe(client, description, run_id)
    except MlflowException as error:
        raise StoreAway(f"tracking.uri={without_secrets(uri)}: {reason(error)}") from None
    if description.run_id != run_id:
        replace(RunDescription.load(run), run_id=run_id).save(run)
    return TrackedRun(uri, run_id, experiment_id, run.uri)


def open_parent(
    config: TrackingConfig, storage: str, *, name: str, key: str, parameters: Mapping[str, Any]
) -> TrackedRun:
    """Opens the run under which a sweep's trials stand (`open_run(parent_run_id=...)`), or the same one again.

    Args:
        config: the tracking section.
        storage: the folder of the run folders.
        name: shown in MLflow.
        key: finds the run again.
        parameters: flat configuration of the sweep.

    Raises:
        UserError: the store is away or refuses.
    """
    opened = open_run(
        config.model_copy(update={"if_away": "refuse"}),
        Storage(storage) / name,
        run_name=name,
        parameters=parameters,
        tags={KEY_TAG: key},
        config_text="",
    )
    assert opened is not None
    return opened


def finish_run(tracked: TrackedRun | None, status: str, run: Storage | None = None) -> bool:
    """Sets how the run ended; never raises, so that it hides no error of the training itself.

    The status is also kept in the run's folder, for a store that is away: `send_metrics.py` sets it later.

    Args:
        tracked: the open run; None where it could not be opened yet.
        status: FINISHED, FAILED or KILLED.
        run: the run's folder, when `tracked` is None.

    Returns:
        Whether the store has it.
    """
    assert status in STATUSES
    folder = run or (Storage(tracked.folder) if tracked else None)
    assert folder is not None
    try:
        replace(RunDescription.load(folder), status=status, ended_ms=_now_ms()).save(folder)
    except (OSError, UserError) as error:
        logger.warning("status %s not kept in %s: %s", status, folder.uri, reason(error))
    return tracked is not None and set_status(tracked, status)


def set_status(tracked: TrackedRun, status: str, ended_ms: int | None = None) -> bool:
    """Sets the run's status in the store; whether that worked."""
    try:
        with waits(timeout_s=5, retries=1):
            MlflowClient(tracked.uri, tracked.uri).set_terminated(tracked.run_id, status, ended_ms)
        return True
    except Exception as error:  # noqa: BLE001 - each database driver has its own errors
        logger.warning("run %s not marked as %s: %s", tracked.run_id, status, reason(error))
        return False


def _experiment(client: MlflowClient, name: str, root: str | None) -> str:
    """The experiment's id; a new one gets an absolute place for its files. Raises UserError."""
    for _ in range(2):
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(
                    f"tracking.experiment={name}: was deleted in MLflow; restore it there "
                    f"(mlflow experiments restore -x {found.experiment_id}) or choose another name"
                )
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name, artifact_location=root))
        except MlflowException as error:
            if not is_code(error, "RESOURCE_ALREADY_EXISTS"):
                raise
    raise UserError(f"tracking.experiment={name}: cannot be created")


def _find(client: MlflowClient, description: RunDescription, experiment_id: str) -> str | None:
    """The run of an earlier try, by MLflow's id or by our own tag; one deleted in MLflow comes back."""
    found = None
    if description.run_id:
        try:
            found = client.get_run(description.run_id)
        except MlflowException as error:
            if not is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                raise
    if found is None and KEY_TAG in description.tags:
        query = f"tags.`{KEY_TAG}` = '{description.tags[KEY_TAG]}'"
        runs = client.search_runs([experiment_id], query, run_view_type=ViewType.ALL, max_results=1)
        found = runs[0] if runs else None
    if found is None:
        return None
    if found.info.lifecycle_stage == "deleted":
        client.restore_run(found.info.run_id)
    return str(found.info.run_id)


def _create(client: MlflowClient, description: RunDescription, experiment_id: str) -> str:
    tags = dict(description.tags)
    if description.parent_run_id:
        tags["mlflow.parentRunId"] = description.parent_run_id
    created = client.create_run(experiment_id, description.started_ms, tags, description.run_name)
    return str(created.info.run_id)


def _describe(client: MlflowClient, description: RunDescription, run_id: str) -> None:
    """Writes status, tags, parameters, configuration and data set; doing it again changes nothing."""
    there = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in description.parameters.items() if key not in there]
    # MLflow refuses another value for a parameter; what differs on resuming is told by a tag.
    changed = {key: value for key, value in description.parameters.items() if there.get(key, value) != value}
    tags = [RunTag(key, value) for key, value in description.tags.items()]
    if changed:
        tags.append(RunTag("esrgan.changed_on_resume", json.dumps(changed)[:TAG_CHARACTERS]))
    if description.status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:  # It ended while the store was away.
        client.set_terminated(run_id, description.status, description.ended_ms)
    client.log_batch(run_id, tags=tags[:100])
    for start in range(0, len(new), PARAMS_IN_A_CALL):
        client.log_batch(run_id, params=new[start : start + PARAMS_IN_A_CALL])
    if description.config_text:
        client.log_text(run_id, description.config_text, "config.yaml")
    digest = description.tags.get(DATA_TAG)
    if digest:
        root = description.parameters.get("data.root", "")
        source = json.dumps({"uri": root})
        data = Dataset("training-data", digest[:DIGEST_CHARACTERS], "local", source)
        client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def _first_start_ms(run: Storage) -> int:
    """When the run in this folder was submitted first: now, if there was none."""
    try:
        return RunDescription.load(run).started_ms or _now_ms()
    except UserError:
        return _now_ms()


def _shown(value: Any, characters: int) -> str:
    """A value as MLflow keeps it: without secrets, and cut."""
    text = without_secrets("none" if value is None else str(value))
    return text if len(text) <= characters else text[: characters - 3] + "..."


def _storage_of(run: Storage) -> str:
    return run.uri.rpartition("/")[0]


def _refusal(error: StoreAway) -> str:
    return f"{error}; start the server, or set tracking.if_away=spool to train now and send later"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
