"""An MLflow server as teams run it: records in PostgreSQL, files in S3, which clients access through the server."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_helpers import (
    Server,
    champion_version,
    client_of,
    everything,
    free_port,
    open_small,
    register,
    small_generator,
    wait_until,
    write_segments,
)

from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.sender import Sender

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAMS, reason="needs PostgreSQL (Debian: apt-get install postgresql)"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg2") is None, reason="needs psycopg2-binary"),
    pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="needs moto[server]"),
]
BUCKET = "mlflow-files"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A separate database on a free port; PostgreSQL does not run as root, so root switches to its user."""
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port = free_port()

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(PROGRAMS[-1] / program), *arguments],
            check=True,
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )

    options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
    call("initdb", "-D", str(folder / "data"), "-U", "mlflow", "--auth=trust", "--no-sync")
    call("pg_ctl", "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://mlflow:geheim@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's S3 on a free port, with a bucket."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def has_bucket() -> bool:
        assert process.poll() is None
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=5
            ).close()
        except OSError:
            return False
        return True

    try:
        wait_until(has_bucket)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(postgres: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("server"), "--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/files",
        backend=postgres,
        environment={
            "MLFLOW_S3_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )  # fmt: skip
    server.start()
    yield server
    server.kill()


def test_records_images_and_generators_are_stored_through_the_server(
    server: Server, tmp_path: Path, monkeypatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)  # Only the server has keys.
    config = TrackingConfig(uri=server.uri)
    run = Storage(str(tmp_path)) / "run"
    tracked = open_small(config, run, "run")
    write_segments(run, 30)
    for _ in range(2):
        with Sender(run, config, tracked, published_step=lambda: 30) as sender:
            assert sender.flush(300) == 0
        run.remove("tracking/sent.json")
    logged = everything(tracked)
    assert [point[0] for point in logged["curves"]["loss/pixel"]] == list(range(1, 31))
    assert len(logged["images"]) == 3 * 2
    assert open_small(config, run, "run") == tracked

    small_generator(tmp_path / "g.safetensors", 0)
    registered = register(tracked, tmp_path / "g.safetensors", 30, {"psnr_y": 30.0})
    assert (registered.version, registered.champion) == (1, True)
    assert champion_version("esrgan-x4", server.uri) == 1
    path = pull_generator("models:/esrgan-x4@champion", server.uri)
    assert path.read_bytes() == (tmp_path / "g.safetensors").read_bytes()
    location = client_of(tracked).get_experiment(tracked.experiment_id).artifact_location
    assert location.startswith("mlflow-artifacts:")


def test_a_database_is_used_without_a_server(postgres: str, server: Server, tmp_path: Path) -> None:
    config = TrackingConfig(uri=postgres, experiment="direct")
    run = Storage(str(tmp_path)) / "run"
    tracked = open_small(config, run, "direct")
    write_segments(run, 10)
    with Sender(run, config, tracked, published_step=lambda: 10) as sender:
        assert sender.flush(300) == 0
    assert len(everything(tracked)["curves"]["loss/pixel"]) == 10
    assert "geheim" not in run.read_bytes("tracking/mlflow.json").decode()
    location = client_of(tracked).get_experiment(tracked.experiment_id).artifact_location
    assert location == f"{tmp_path}/mlartifacts"
