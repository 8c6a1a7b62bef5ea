"""The password of `tracking.uri` is not in a run's files, not in the output and not in MLflow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from evaluation_helpers import exit_code
from tiny import command, fields, run_until, write_sets
from tracking_helpers import Server, free_port

from pipeline.tracking.sender import Sender

pytestmark = pytest.mark.slow
SECRET, OTHER = "geheim-7f3a", "neu-91bc"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sets(tmp_path)


def with_password(uri: str, password: str) -> str:
    return uri.replace("://", f"://trainer:{password}@")


def environment(uri: str) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**variables, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "ESRGAN_TRACKING__URI": uri}


def run(job: str, folder: Path, values: dict[str, Any], uri: str) -> str:
    """The output of a job, which must succeed."""
    finished = forked.run(command(job, folder, values)[1:], environment=environment(uri))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def files_with(folder: Path, *secrets: str) -> list[str]:
    """Files below `folder` that contain one of the secrets."""
    return [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def test_a_run_and_its_resumption_with_another_password(folder: Path, server: Server) -> None:
    values = fields(folder, **{"tracking.register_model": True})
    program = command("train_gan", folder, values)
    run_until(program, "[psnr] step 4/12", environment(with_password(server.uri, SECRET)))
    printed = run("train_gan", folder, values, with_password(server.uri, OTHER))
    assert "resuming at step" in printed
    assert "registered esrgan-x4 version" in printed
    assert SECRET not in printed
    assert OTHER not in printed
    assert files_with(folder, SECRET, OTHER) == files_with(server.folder, SECRET, OTHER) == []
    written = folder / "runs" / "tiny" / "config.yaml"
    assert f"uri: {server.uri.replace('://', '://***@')}" in written.read_text()


def test_an_outage_is_reported_without_the_password(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flush = Sender.flush
    monkeypatch.setattr(Sender, "flush", lambda self, timeout_s: flush(self, 1.0))
    monkeypatch.setenv("ESRGAN_TRACKING__URI", with_password(f"http://127.0.0.1:{free_port()}", SECRET))
    values = fields(folder, **{"tracking.if_unreachable": "spool", "tracking.register_model": True})
    assert exit_code("train_gan", *command("train_gan", folder, values)[2:]) == 0
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "metrics are stored in" in printed
    assert SECRET not in printed
    assert files_with(folder, SECRET) == []


@pytest.mark.ray
@pytest.mark.parametrize("job", ["train_gan", "tune_gan"])
def test_ray_writes_no_password_next_to_the_runs(
    ray_cluster: str,
    folder: Path,
    server: Server,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    space = {"gan.adversarial_weight": {"low": 1e-4, "high": 5e-2}}
    sweep = {"tune.name": "sweep", "tune.trials": 1, "tune.space": space} if job == "tune_gan" else {}
    monkeypatch.setenv("ESRGAN_TRACKING__URI", with_password(server.uri, SECRET))
    values = fields(folder, workers=1, **sweep)
    assert exit_code(job, *command(job, folder, values)[2:]) == 0
    assert SECRET not in "".join(capfd.readouterr()) + caplog.text
    assert files_with(folder, SECRET) == files_with(server.folder, SECRET) == []
