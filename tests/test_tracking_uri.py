"""Tracking URIs: absolute, accepted or refused in one line, and never shown with a password."""

from pathlib import Path

import pytest

from pipeline.errors import UserError, without_secrets
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.uri import absolute_uri, artifact_root, known_uri, resolve_uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://u:p%40ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        (
            "postgresql://db/x?password=geheim&sslmode=require",
            "postgresql://db/x?password=***&sslmode=require",
        ),
        ("http://token@host/", "http://***@host/"),
        ("postgresql://me:p@s/s@db/x", "postgresql://***@db/x"),
        ("mssql://me:p@db/x?PWD=geheim", "mssql://***@db/x?PWD=***"),
        ("http://host:5000/x and s3://bucket/a@b", "http://host:5000/x and s3://bucket/a@b"),
        (
            "tracking: {uri: 'http://me:pass@host'}\nmail: a@b",
            "tracking: {uri: 'http://***@host'}\nmail: a@b",
        ),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_default_database_is_next_to_the_runs(tmp_path) -> None:
    uri = resolve_uri(TrackingConfig(), str(tmp_path))
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifact_root(uri, str(tmp_path)) == f"{tmp_path}/mlartifacts"


def test_a_database_may_be_in_the_storage_that_the_first_run_creates(tmp_path) -> None:
    storage, uri = str(tmp_path / "runs"), f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri(TrackingConfig(uri=uri), storage) == uri
    with pytest.raises(UserError, match="not a file in an existing folder"):
        resolve_uri(TrackingConfig(uri=uri), str(tmp_path / "others"))


def test_a_relative_file_becomes_absolute(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///my.db") == f"sqlite:///{tmp_path}/my.db"


def test_a_server_chooses_its_artifact_location() -> None:
    assert artifact_root("http://host:5000", "/runs") is None


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", "not the URI of an MLflow server"),
        ("file:///tmp/mlruns", "not the URI of an MLflow server"),
        ("ftp://host/x", "not the URI of an MLflow server"),
        ("http://", "has no host"),
        ("http://host:port", "has no host, or its port"),
        ("sqlite:////no/such/folder/mlflow.db", "not a file in an existing folder"),
        ("sqlite://", "name a file"),
        ("http2://me:geheim@host", "http2://"),
    ],
)
def test_an_invalid_uri_is_refused_in_one_line(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        absolute_uri(uri)
    assert "\n" not in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_errors_never_show_a_password() -> None:
    assert str(UserError("cannot open http://me:geheim@host")) == "cannot open http://***@host"


def test_a_written_configuration_masks_the_password_and_a_loaded_one_has_it() -> None:
    config = TrackingConfig(uri="http://me:geheim@host:5000")
    assert config.model_dump(mode="json")["uri"] == "http://***@host:5000"
    assert "geheim" not in config.model_dump_json() + repr(config)
    assert TrackingConfig.model_validate(config.model_dump()).uri == config.uri


def test_a_masked_uri_is_replaced_by_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ESRGAN_TRACKING__URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:geheim@host")
    masked = TrackingConfig(uri="http://***@host")
    assert resolve_uri(masked, "/runs") == "http://me:geheim@host"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="no tracking server is configured"):
        resolve_uri(masked, "/runs")
    with pytest.raises(UserError, match="its password is masked"):
        absolute_uri("http://***@host")


def test_runs_on_s3_need_a_server() -> None:
    with pytest.raises(UserError, match=r"tracking\.uri is not set"):
        resolve_uri(TrackingConfig(), "s3://bucket/runs")


def test_the_argument_precedes_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESRGAN_TRACKING__URI", "http://ours:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert known_uri("http://given:1") == "http://given:1"
    assert known_uri(None) == "http://ours:1"
    monkeypatch.delenv("ESRGAN_TRACKING__URI")
    assert known_uri(None) == "http://mlflow:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="no tracking server is configured"):
        known_uri(None)
