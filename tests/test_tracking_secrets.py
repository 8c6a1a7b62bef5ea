"""The password of `tracking.uri` is not in a run's files, not in the output and not in MLflow."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import command, fields, run_until, write_sets
from tracking_helpers import Server

pytestmark = pytest.mark.slow
SECRET, OTHER = "geheim-7f3a", "neu-91bc"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "mlflow").mkdir()
    server = Server(tmp_path / "mlflow")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sets(tmp_path)


def uri_with(server: Server, password: str) -> str:
    return server.uri.replace("://", f"://trainer:{password}@")


def environment(uri: str) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**variables, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "ESRGAN_TRACKING__URI": uri}


def run(job: str, folder: Path, values: dict[str, Any], uri: str) -> str:
    """The output of a job, which must succeed."""
    finished = subprocess.run(
        command(job, folder, values), capture_output=True, text=True, env=environment(uri), check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def files_with(folder: Path, *secrets: str) -> list[str]:
    """Files below `folder` that contain one of the secrets."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def test_a_run_and_its_resumption_with_another_password(folder: Path, server: Server) -> None:
    values = fields(folder)
    run_until(command("train_gan", folder, values), "[psnr] step 4/12", environment(uri_with(server, SECRET)))
    printed = run("train_gan", folder, values, uri_with(server, OTHER))
    assert "resuming at step" in printed
    assert "registered esrgan-x4 version 1" in printed
    assert SECRET not in printed
    assert OTHER not in printed
    assert files_with(folder, SECRET, OTHER) == []
    written = folder / "runs" / "tiny" / "config.yaml"
    assert f"uri: {server.uri.replace('://', '://***@')}" in written.read_text()


def test_an_outage_is_reported_without_the_password(folder: Path, server: Server) -> None:
    server.kill()
    values = fields(folder, **{"tracking.if_unreachable": "spool"})
    printed = run("train_gan", folder, values, uri_with(server, SECRET))
    assert "metrics are stored in" in printed
    assert SECRET not in printed
    assert files_with(folder, SECRET) == []


@pytest.mark.ray
@pytest.mark.parametrize("job", ["train_gan", "tune_gan"])
def test_ray_writes_no_password_next_to_the_runs(folder: Path, server: Server, job: str) -> None:
    space = {"gan.adversarial_weight": {"low": 1e-4, "high": 5e-2}}
    sweep = {"tune.name": "sweep", "tune.trials": 1, "tune.space": space} if job == "tune_gan" else {}
    printed = run(job, folder, fields(folder, workers=1, **sweep), uri_with(server, SECRET))
    assert SECRET not in printed
    assert files_with(folder, SECRET) == []
