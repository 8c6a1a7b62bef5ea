"""The commands about tracking: what they print, write and refuse."""

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_tracking_candidate import candidate_of
from tracking_helpers import new_database, open_small, register, small_generator, write_segments

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.pending import upload_pending
from pipeline.tracking.run import TrackedRun, open_run
from pipeline.tracking.uri import write_last_uri

sys.path.insert(0, str(Path(__file__).parent.parent / "jobs"))
import promote
import send_metrics


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    """A run with two registered generators, and two segments that are not sent."""
    storage = tmp_path_factory.mktemp("runs")
    new_database(storage)
    run = Storage(str(storage)) / "run"
    tracked = open_small(TrackingConfig(), run, "commands")
    for seed in (1, 2):
        small_generator(storage / f"{seed}.safetensors", seed)
        register(tracked, storage / f"{seed}.safetensors", seed, {"psnr_y": 31.0 - seed})
    write_segments(run, 20)
    run.write_bytes("checkpoints/psnr-00000020/manifest.json", b"{}")
    return tracked


def test_promote_moves_the_champion_and_prints_the_previous_one(
    tracked: TrackedRun, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out.json"
    promote.main(["--model-version", "2", "--tracking.uri", tracked.uri, "--json", str(out)])
    assert capsys.readouterr().out.splitlines()[1:] == ["champion of esrgan-x4: version 2 (it was version 1)"]
    assert json.loads(out.read_text()) == {"model_name": "esrgan-x4", "champion": 2, "was": 1}


def test_promote_uses_the_database_next_to_the_runs(tracked: TrackedRun, capsys) -> None:
    storage = str(Path(tracked.folder).parent)
    promote.main(["--model-version", "1", "--storage", storage])
    assert "champion of esrgan-x4: version 1" in capsys.readouterr().out


def test_promote_uses_the_tracking_uri_of_the_last_run(tracked: TrackedRun, capsys, monkeypatch) -> None:
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI", "ESRGAN_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    write_last_uri(tracked.uri)
    promote.main(["--model-version", "1"])
    assert "champion of esrgan-x4: version 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-version", "9"], "models:/esrgan-x4/9: no such version; known: 1, 2"),
        (
            ["--model-version", "1", "--tracking.model_name", "x"],
            "models:/x: no such registered model",
        ),
        (["--model-version", "one"], "invalid int value"),
        ([], "--model-version"),
    ],
)
def test_promote_refuses_in_one_line(tracked: TrackedRun, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        promote.main([*arguments, "--tracking.uri", tracked.uri])


def test_promote_creates_no_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        promote.main(["--model-version", "1", "--tracking.uri", f"sqlite:///{tmp_path}/none.db"])
    assert list(tmp_path.iterdir()) == []


def test_send_metrics_sends_once(tracked: TrackedRun, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("ESRGAN_TRACKING__URI", raising=False)
    out = tmp_path / "out.json"
    send_metrics.main(["--run", tracked.folder, "--json", str(out)])
    assert json.loads(out.read_text()) == {
        "run_id": tracked.run_id, "status": "RUNNING", "sent": 2, "model_version": None,
    }  # fmt: skip
    send_metrics.main(["--run", tracked.folder])
    _, first, _, second = capsys.readouterr().out.splitlines()
    assert first == f"2 segments sent; run {tracked.run_id} is marked RUNNING"
    assert second.startswith("nothing to send")


def test_a_run_without_a_server_is_sent_to_that_of_the_last_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    uri, out = new_database(tmp_path), tmp_path / "out.json"
    run = Storage(str(tmp_path)) / "offline"
    open_run(
        TrackingConfig(uri="none"),
        run,
        run_name="offline",
        parameters={},
        tags={"esrgan.key": "o"},
        config_text="",
    )
    write_segments(run, 20)
    run.write_bytes("checkpoints/psnr-00000020/manifest.json", b"{}")
    with pytest.raises(UserError, match="no tracking server is configured"):
        send_metrics.main(["--run", run.uri])
    write_last_uri(uri)
    send_metrics.main(["--run", run.uri, "--json", str(out)])
    sent = json.loads(out.read_text())
    assert sent["sent"] == 2
    assert MlflowClient(uri, uri).get_run(sent["run_id"]).info.run_name == "offline"


def test_a_moved_run_is_sent_to_the_database_that_moved_with_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    new_database(tmp_path / "old")
    tracked = open_small(TrackingConfig(), Storage(f"{tmp_path}/old/run"), "moved")
    (tmp_path / "old").rename(tmp_path / "new")
    run = Storage(f"{tmp_path}/new/run")
    write_segments(run, 20)
    run.write_bytes("checkpoints/psnr-00000020/manifest.json", b"{}")
    result = upload_pending(run, None)
    assert (result.run_id, result.sent) == (tracked.run_id, 2)
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    assert MlflowClient(uri, uri).get_run(result.run_id).info.artifact_uri.startswith(f"{tmp_path}/new/")


def test_a_finished_run_is_registered_under_another_name(tmp_path: Path) -> None:
    uri, out = new_database(tmp_path), tmp_path / "out.json"
    run = Storage(str(tmp_path)) / "finished"
    open_run(
        TrackingConfig(uri="none"), run, run_name="f", parameters={}, tags={"esrgan.key": "f"}, config_text=""
    )
    candidate_of(run, tmp_path).save(run)
    arguments = ["--run", run.uri, "--tracking.uri", uri, "--json", str(out), "--tracking.model_name"]
    with pytest.raises(UserError, match=r"--tracking\.model_name: 'a/b' cannot be registered"):
        send_metrics.main([*arguments, "a/b"])
    send_metrics.main([*arguments, "second-name"])
    assert json.loads(out.read_text())["model_version"] == 1
    assert [model.name for model in MlflowClient(uri, uri).search_registered_models()] == ["second-name"]


def test_send_metrics_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        send_metrics.main(["--run", str(tmp_path)])
