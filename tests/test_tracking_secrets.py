"""The password of `tracking.uri` is in no file of a run, in nothing that is printed, and nowhere in MLflow."""

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


def address(server: Server, password: str) -> str:
    return server.uri.replace("://", f"://trainer:{password}@")


def environment(uri: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "ESRGAN_TRACKING__URI": uri}


def run(job: str, folder: Path, values: dict[str, Any], uri: str) -> str:
    """What the job prints; it must succeed."""
    done = subprocess.run(
        command(job, folder, values), capture_output=True, text=True, env=environment(uri), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def holding(folder: Path, *secrets: str) -> list[str]:
    """Files below `folder` that hold one of the secrets."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


def test_a_run_and_its_resumption_with_another_password(folder: Path, server: Server) -> None:
    values = fields(folder)
    run_until(command("train_gan", folder, values), "[psnr] step 4/12", environment(address(server, SECRET)))
    printed = run("train_gan", folder, values, address(server, OTHER))
    assert "resuming at step" in printed
    assert "registered esrgan-x4 version 1" in printed
    assert SECRET not in printed
    assert OTHER not in printed
    assert holding(folder, SECRET, OTHER) == []
    written = folder / "runs" / "tiny" / "config.yaml"
    assert f"uri: {server.uri.replace('://', '://***@')}" in written.read_text()


def test_an_outage_is_reported_without_the_password(folder: Path, server: Server) -> None:
    server.kill()
    values = fields(folder, **{"tracking.if_away": "spool"})
    printed = run("train_gan", folder, values, address(server, SECRET))
    assert "metrics wait in" in printed
    assert SECRET not in printed
    assert holding(folder, SECRET) == []


@pytest.mark.ray
@pytest.mark.parametrize("job", ["train_gan", "tune_gan"])
def test_ray_writes_no_password_beside_the_runs(folder: Path, server: Server, job: str) -> None:
    space = {"gan.adversarial_weight": {"low": 1e-4, "high": 5e-2}}
    sweep = {"tune.name": "sweep", "tune.trials": 1, "tune.space": space} if job == "tune_gan" else {}
    printed = run(job, folder, fields(folder, workers=1, **sweep), address(server, SECRET))
    assert SECRET not in printed
    assert holding(folder, SECRET) == []
