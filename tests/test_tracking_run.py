"""One MLflow run per run folder; no secrets; final status and reason recorded."""

import json
import socket
import time
from pathlib import Path

import forked
import pytest
from tracking_helpers import DATA, client_of, events_of, free_port, new_database, open_small, shorten

from pipeline.errors import UserError
from pipeline.run_folder import MLFLOW_RUN
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import CONNECT_LIMITS, bounded_requests
from pipeline.tracking.run import finish_run, open_described, open_parent, open_run, require_tracking


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A folder for runs, with one database for the whole module."""
    folder = tmp_path_factory.mktemp("runs")
    new_database(folder)
    return Storage(str(folder))


@pytest.fixture
def run(storage: Storage, request: pytest.FixtureRequest) -> Storage:
    return storage / request.node.name


CONFIG = TrackingConfig()


def test_opening_again_continues_the_same_run(run: Storage) -> None:
    first = open_small(CONFIG, run, "again")
    finish_run(first, "FAILED")
    assert client_of(first).get_run(first.run_id).info.status == "FAILED"
    second = open_small(CONFIG, run, "again", run_id=first.run_id)
    assert second == first
    assert client_of(first).get_run(first.run_id).info.status == "RUNNING"


def test_a_run_is_found_by_its_key_tag_alone(run: Storage) -> None:
    first = open_small(CONFIG, run, "by-tag")
    assert open_small(CONFIG, run, "by-tag", run_id="0" * 32).run_id == first.run_id


def test_other_keys_are_other_runs(run: Storage) -> None:
    assert open_small(CONFIG, run, "one").run_id != open_small(CONFIG, run, "two").run_id


def test_configuration_data_code_and_machine_are_logged(run: Storage) -> None:
    tracked = open_small(
        CONFIG, run, "facts", parameters={"data.root": "/images", "gan.steps": 5, "long": "x" * 9000}
    )
    logged = client_of(tracked).get_run(tracked.run_id)
    assert logged.data.params["gan.steps"] == "5"
    assert len(logged.data.params["long"]) == 6000
    assert logged.inputs.dataset_inputs[0].dataset.digest == DATA[:36]
    assert {"version.torch", "version.mlflow", "machine.cpus"} <= set(logged.data.tags)
    path = client_of(tracked).download_artifacts(tracked.run_id, "config.yaml")
    assert Path(path).read_text() == "gan: {steps: 5}\n"


def test_many_parameters_fit(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "many", parameters={f"p{i}": i for i in range(250)})
    assert len(client_of(tracked).get_run(tracked.run_id).data.params) == 250


def test_a_changed_parameter_becomes_a_tag(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "changed", parameters={"workers": 1})
    open_small(CONFIG, run, "changed", parameters={"workers": 2, "new": 3})
    data = client_of(tracked).get_run(tracked.run_id).data
    assert data.params == {"workers": "1", "new": "3"}
    assert json.loads(data.tags["esrgan.changed_on_resume"]) == {"workers": "2"}


def test_no_password_reaches_mlflow_or_the_folder(run: Storage) -> None:
    secret = "postgresql://me:geheim@db/mlflow"
    tracked = open_small(
        CONFIG, run, "secret", parameters={"tracking.uri": secret}, config_text=f"uri: {secret}\n",
        tags={"esrgan.key": "secret", "note": secret},
    )  # fmt: skip
    data = client_of(tracked).get_run(tracked.run_id).data
    config = Path(client_of(tracked).download_artifacts(tracked.run_id, "config.yaml")).read_text()
    spool = b"".join(run.read_bytes(name) for name in run.files())
    assert "geheim" not in f"{data.params}{data.tags}{config}{tracked}" + spool.decode()
    assert data.params["tracking.uri"] == "postgresql://***@db/mlflow"


def test_a_run_deleted_in_mlflow_is_restored_on_resume(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "deleted")
    client_of(tracked).delete_run(tracked.run_id)
    assert open_small(CONFIG, run, "deleted") == tracked
    assert client_of(tracked).get_run(tracked.run_id).info.lifecycle_stage == "active"


def test_children_have_their_parents_tag(storage: Storage, run: Storage) -> None:
    parent = open_parent(CONFIG, storage.uri, name="sweep", key="sweep-key", parameters={"tune.trials": 3})
    assert open_parent(CONFIG, storage.uri, name="sweep", key="sweep-key", parameters={}) == parent
    child = open_small(CONFIG, run, "child", parent_run_id=parent.run_id)
    assert client_of(child).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_deleted_experiment_is_refused(run: Storage) -> None:
    config = TrackingConfig(experiment="gone")
    tracked = open_small(config, run, "gone")
    client_of(tracked).delete_experiment(tracked.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment=gone: was deleted"):
        open_small(config, run, "gone-2")


def test_the_experiments_artifact_location_is_absolute(storage: Storage, run: Storage) -> None:
    tracked = open_small(CONFIG, run, "location")
    location = client_of(tracked).get_experiment(tracked.experiment_id).artifact_location
    assert location == f"{storage.uri}/mlartifacts" or location.startswith(f"{storage.uri}/mlartifacts/")


@pytest.mark.parametrize("kind", ["refused", pytest.param("silent", marks=pytest.mark.slow)])
def test_an_unreachable_server_is_a_one_line_error_within_seconds(
    run: Storage, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(CONNECT_LIMITS, monkeypatch, at_most_s=10)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # Accepts, and never answers.
        port = silent.getsockname()[1] if kind == "silent" else free_port()
        config = TrackingConfig(uri=f"http://me:geheim@127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"tracking\.uri=http://\*\*\*@127\.0\.0\.1:\d+: (connection|no answer)"
        ) as caught:
            require_tracking(config, run.uri)
        assert time.monotonic() - began < 60
    assert "geheim" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_may_start_without_the_server(run: Storage) -> None:
    config = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", if_unreachable="spool")
    require_tracking(config, run.uri)
    opened = open_run(config, run, run_name="r", parameters={}, tags={"esrgan.key": "k"}, config_text="")
    assert opened is None
    assert run.exists("tracking/mlflow.json")


def test_finishing_a_run_never_raises(run: Storage) -> None:
    assert not finish_run(None, "FAILED", run)


def test_a_failure_is_logged_with_its_reason_and_no_secret(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "failure")
    run.write_bytes("checkpoints/psnr-00000020/manifest.json", b"{}")
    assert finish_run(tracked, "FAILED", reason="ValueError: bad\nline, http://me:geheim@host " + "x" * 9000)
    logged = client_of(tracked).get_run(tracked.run_id)
    reason = logged.data.tags["esrgan.failure"]
    assert logged.info.status == "FAILED"
    assert reason.startswith("ValueError: bad line, http://***@host xxx")
    assert len(reason) == 8000
    (line,) = events_of(tracked)
    assert line.startswith("step       20  ")
    assert line.partition("UTC  ")[2] == f"run failed: {reason}"
    assert MLFLOW_RUN.read(run).reason == reason


def test_the_first_reason_is_kept(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "first-reason")
    finish_run(tracked, "FAILED", reason="the cause")
    finish_run(tracked, "FAILED", reason="a consequence")
    assert client_of(tracked).get_run(tracked.run_id).data.tags["esrgan.failure"] == "the cause"
    assert [line.partition("UTC  ")[2] for line in events_of(tracked)] == ["run failed: the cause"]


def test_a_resumed_run_is_no_longer_marked_as_failed(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "resumed")
    finish_run(tracked, "FAILED", reason="disk full")
    open_small(CONFIG, run, "resumed")
    assert "esrgan.failure" not in client_of(tracked).get_run(tracked.run_id).data.tags
    finish_run(tracked, "FINISHED")
    assert client_of(tracked).get_run(tracked.run_id).info.status == "FINISHED"
    assert MLFLOW_RUN.read(run).reason == ""
    assert len(events_of(tracked)) == 1


def test_a_reason_reaches_mlflow_once_the_server_answers(run: Storage) -> None:
    tracked = open_small(CONFIG, run, "unreachable-failure")
    assert not finish_run(None, "FAILED", run, reason="out of memory")
    for _ in range(2):
        open_described(run, tracked.uri)
    assert client_of(tracked).get_run(tracked.run_id).data.tags["esrgan.failure"] == "out of memory"
    assert [line.partition("UTC  ")[2] for line in events_of(tracked)] == ["run failed: out of memory"]


def test_request_limits_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    outer, inner = bounded_requests(10, 1), bounded_requests(3, 0)
    outer.__enter__()
    inner.__enter__()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    outer.__exit__(None, None, None)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    inner.__exit__(None, None, None)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.slow
def test_several_processes_create_one_database(tmp_path) -> None:
    processes = [
        forked.CONTEXT.Process(target=require_tracking, args=(TrackingConfig(), str(tmp_path)))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
