"""The tracking URI of the last run as the default of other commands, and the commands printed at the end of a run."""

from pathlib import Path

import pytest
from tracking_helpers import new_database, open_small

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.next_steps import next_steps
from pipeline.tracking.uri import known_uri, last_uri_file, write_last_uri


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_the_last_runs_uri_is_used_after_flag_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no tracking server is configured"):
        known_uri(None)
    uri = new_database(tmp_path)
    assert write_last_uri(uri) == last_uri_file()
    assert known_uri(None) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert known_uri(None) == "http://environment:5000"
    assert known_uri("http://flag:5000") == "http://flag:5000"


def test_a_database_that_has_moved_names_the_file(tmp_path: Path) -> None:
    write_last_uri(f"sqlite:///{tmp_path}/gone/mlflow.db")
    with pytest.raises(UserError, match="not a file in an existing folder") as caught:
        known_uri(None)
    assert str(last_uri_file()) in str(caught.value)


def test_a_password_is_never_written(tmp_path: Path) -> None:
    assert write_last_uri("postgresql://user:secret@host/db") is None
    assert not last_uri_file().exists()


def test_a_home_that_cannot_be_written_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file")
    assert write_last_uri("http://host:5000") is None


def test_the_commands_after_a_run_have_its_tracking_uri(tmp_path: Path) -> None:
    uri = new_database(tmp_path / "a b")
    tracked = open_small(TrackingConfig(uri=uri), Storage(str(tmp_path / "run")), "a")
    tracking, show, use = next_steps(uri, tracked.run_id, "models:/esrgan-x4/3")
    assert tracking == f"tracking URI: {uri} (the default of other commands: {last_uri_file()})"
    assert f"--backend-store-uri '{uri}'" in show
    page = f"#/experiments/{tracked.experiment_id}/runs/{tracked.run_id}?workflowType=machine_learning"
    assert show.endswith(page)
    assert use == "upscale: python jobs/upscale.py -n models:/esrgan-x4/3 -i IMAGES -o OUT"
    assert len(next_steps(uri, tracked.run_id, None)) == 2


def test_an_unreachable_server_still_has_a_link() -> None:
    _, show = next_steps("http://127.0.0.1:1", "run", None)
    assert show == "MLflow UI: http://127.0.0.1:1/#/experiments?workflowType=machine_learning"
