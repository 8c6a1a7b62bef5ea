"""A real MLflow server that is killed and restarted."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking_helpers import (
    DATA,
    Server,
    champion_version,
    client_of,
    event,
    everything,
    open_small,
    records_between,
    register,
    small_generator,
    wait_until,
    write_segments,
)

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking import upload
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.pending import upload_pending
from pipeline.tracking.run import finish_run, open_run
from pipeline.tracking.sender import Sender
from pipeline.tracking.spool import segment_steps, write_segment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def running(server: Server) -> Server:
    """The module's server, started again if a test has killed it."""
    if not server.alive:
        server.start()
    return server


def publish(run: Storage, step: int) -> None:
    """Writes a checkpoint's manifest, after which its segments are sent."""
    run.write_bytes(f"checkpoints/psnr-{step:08d}/manifest.json", b"{}")


def newest(run: Storage) -> int:
    names = run.names("checkpoints")
    return int(names[-1].split("-")[1]) if names else -1


def train(run: Storage, step: int) -> None:
    """One interval of a run: writes and publishes a segment."""
    extra = [event(step, "resumed")] if step == 30 else []
    write_segment(run, step, [*records_between(step - 10, step), *extra])
    publish(run, step)


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """Every write fails until the patch is undone."""

    def full(self: Storage, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(Storage, "write_bytes", full)


def test_outages_and_a_full_disk_change_nothing_in_mlflow(
    tmp_path: Path, running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackingConfig(uri=running.uri)
    disturbed, quiet = Storage(str(tmp_path)) / "disturbed", Storage(str(tmp_path)) / "quiet"
    tracked = open_small(config, disturbed, "disturbed")
    with Sender(disturbed, config, tracked, published_step=lambda: newest(disturbed), poll_s=0.05) as sender:
        for step in range(10, 81, 10):
            if step in (20, 50):
                running.kill()
            if step == 50:  # The write fails as a whole, and the interval is trained again.
                fill_disk(monkeypatch)
                with pytest.raises(OSError, match="No space"):
                    train(disturbed, step)
                monkeypatch.undo()
            train(disturbed, step)
            if step in (30, 60):
                running.start()
            if step == 60:
                wait_until(lambda: disturbed.exists("tracking/sent.json"))
        assert sender.flush(300) == 0
    finish_run(tracked, "FINISHED")

    undisturbed = open_small(config, quiet, "quiet")
    for step in range(10, 81, 10):
        train(quiet, step)
    with Sender(quiet, config, undisturbed, published_step=lambda: newest(quiet)) as sender:
        assert sender.flush(300) == 0

    logged = everything(tracked)
    assert logged == everything(undisturbed)
    assert [point[0] for point in logged["curves"]["loss/pixel"]] == list(range(1, 81))
    assert len(logged["images"]) == 8 * 2
    assert client_of(tracked).get_run(tracked.run_id).info.status == "FINISHED"


def test_a_server_killed_within_a_segment_gets_it_once(
    tmp_path: Path, running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackingConfig(uri=running.uri)
    run = Storage(str(tmp_path)) / "middle"
    tracked = open_small(config, run, "middle")
    write_segments(run, 20)
    real, kills = upload._log_images, []

    def kill_server_after_the_images(*args) -> None:
        if not kills:
            kills.append("once")
            real(*args)  # The images are logged, sent.json is not written.
            running.kill()
        real(*args)

    monkeypatch.setattr(upload, "_log_images", kill_server_after_the_images)
    with Sender(run, config, tracked, published_step=lambda: 20, poll_s=0.05) as sender:
        wait_until(lambda: not running.alive)
        running.start()
        assert sender.flush(300) == 0
    logged = everything(tracked)
    assert [point[0] for point in logged["curves"]["loss/pixel"]] == list(range(1, 21))
    assert len(logged["images"]) == 2 * 2


def test_a_server_unreachable_at_the_start_gets_everything_once_it_answers(
    tmp_path: Path, running: Server
) -> None:
    running.kill()
    config = TrackingConfig(uri=running.uri, if_unreachable="spool")
    run = Storage(str(tmp_path)) / "late"
    opened = open_run(
        config,
        run,
        run_name="late",
        parameters={"a": 1},
        tags={"esrgan.key": "late", "esrgan.data": DATA},
        config_text="",
    )
    assert opened is None
    with Sender(run, config, opened, published_step=lambda: newest(run), poll_s=0.05) as sender:
        train(run, 10)
        running.start()
        assert sender.flush(300) == 0
        assert sender.tracked is not None
        assert len(everything(sender.tracked)["curves"]["loss/pixel"]) == 10
        assert client_of(sender.tracked).get_run(sender.tracked.run_id).info.status == "RUNNING"


def test_a_server_unreachable_until_after_the_end_gets_everything_by_a_command(
    tmp_path: Path, running: Server
) -> None:
    config = TrackingConfig(uri=running.uri)
    run = Storage(str(tmp_path)) / "ended"
    tracked = open_small(config, run, "ended")
    running.kill()
    write_segments(run, 30)
    publish(run, 30)
    with Sender(run, config, tracked, published_step=lambda: newest(run)) as sender:
        assert sender.flush(1) == 3
    assert not finish_run(tracked, "FINISHED")
    with pytest.raises(UserError, match="connection refused; no data was lost"):
        upload_pending(run, None)
    running.start()
    assert upload_pending(run, None).sent == len(segment_steps(run))
    assert len(everything(tracked)["curves"]["loss/pixel"]) == 30
    assert client_of(tracked).get_run(tracked.run_id).info.status == "FINISHED"


def test_generators_are_registered_and_pulled_through_the_server(tmp_path: Path, running: Server) -> None:
    config = TrackingConfig(uri=running.uri, model_name="served-x4")
    tracked = open_small(config, Storage(str(tmp_path)) / "run", "registering")
    small_generator(tmp_path / "g.safetensors", 0)
    weights = tmp_path / "g.safetensors"
    first, again = (register(tracked, weights, 5, {"psnr_y": 30.0}, model_name="served-x4") for _ in range(2))
    assert (first.version, again.version, first.champion) == (1, 1, True)
    assert champion_version("served-x4", running.uri) == 1
    path = pull_generator("models:/served-x4@champion", running.uri)
    assert path.read_bytes() == (tmp_path / "g.safetensors").read_bytes()
    assert os.path.commonpath([path, tmp_path]) != str(tmp_path)
    model = client_of(tracked).search_logged_models([tracked.experiment_id])[0]
    assert "served-x4" in model.tags["mlflow.modelVersions"]
