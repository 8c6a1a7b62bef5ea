"""Whole runs in MLflow: unreachable servers, object storage, the registered model's card."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from s3 import s3_bucket
from tiny import train, write_photos
from tracking_helpers import Server, new_database

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.sender import Sender

sys.path.insert(0, str(Path(__file__).parent.parent / "jobs"))
import send_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    new_database(folder / "runs")
    write_photos(folder / "photos", 3, 96, seed=1)
    write_photos(folder / "held_out", 2, 128, seed=2)
    (folder / "photos" / "LICENSE.txt").write_text("CC0, drawn for a test\n")
    return folder


def metrics_of(client: MlflowClient, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every curve that does not depend on times, rates and the machine."""
    keys = [
        key
        for key in client.get_run(run_id).data.metrics
        if key.startswith(("loss/", "validation/", "psnr", "ssim", "train/learning_rate"))
    ]
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        for key in keys
    }


def test_a_server_unreachable_until_after_the_end_loses_neither_metrics_nor_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = Sender.flush
    server = Server(tmp_path)
    changes = {"tracking.uri": server.uri, "tracking.register_model": True}
    # Only here flush() cannot succeed: the undisturbed run below gets all the time that a busy machine needs.
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "flush", lambda self, timeout_s: flush(self, 1.0))
        result = train(folder, run_name="unreachable", **changes, **{"tracking.if_unreachable": "spool"})
    assert (result.run_id, result.model_version, result.step) == (None, None, 12)
    run = Storage(str(folder / "runs" / "unreachable"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "send_metrics.py" in line]
    assert lines[-1] == (
        "registering esrgan-x4: the tracking server is unreachable; no data was lost; once the server is back, run: "
        f"python jobs/send_metrics.py --run {run.uri}"
    )
    server.start()
    try:
        send_metrics.main(["--run", run.uri])
        undisturbed = train(folder, run_name="quiet", **changes)
        client = MlflowClient(server.uri, server.uri)
        late = json.loads(run.read_bytes("result.json"))
        assert (late["model_version"], undisturbed.model_version) == (1, 2)
        assert client.get_run(late["run_id"]).info.status == "FINISHED"
        assert undisturbed.run_id is not None
        assert metrics_of(client, late["run_id"]) == metrics_of(client, undisturbed.run_id)
        # The results are equal: the later one is not better.
        assert client.get_registered_model("esrgan-x4").aliases == {"champion": "1", "challenger": "2"}
    finally:
        server.kill()


def test_a_run_on_s3_registers_a_model_with_its_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_database(tmp_path)
    with s3_bucket(monkeypatch) as bucket:
        result = train(
            folder,
            storage=f"{bucket}/runs",
            **{"tracking.uri": uri, "tracking.register_model": True, "data.root": str(tmp_path / "data")},
        )
        assert result.model_version == 1
        assert not (Storage(f"{bucket}/runs") / "tiny").exists("tracking/candidate")
    model = pull_generator("models:/esrgan-x4@champion", uri).parent.parent
    card = (model / "README.md").read_text()
    assert "CC0, drawn for a test" in card
    assert "![image0.png](image-0.png)" in card
    assert (model / "image-1.png").is_file()
    example = np.asarray(json.loads((model / "serving_input_example.json").read_text())["inputs"])
    assert example.shape == (1, 24, 32, 3)
    client = MlflowClient(uri, uri)
    assert "](" not in client.get_model_version("esrgan-x4", "1").description
    (experiment,) = client.search_experiments(filter_string="name = 'esrgan'")
    names = {logged.name for logged in client.search_logged_models([experiment.experiment_id])}
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    # Stage 1's result is logged as well, to be compared.
    assert "generator-00000006" in names
    assert len(names) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("loss is\nnot finite"), "RuntimeError: loss is not finite"),
        (UserError("crop_px=8: too small"), "crop_px=8: too small"),
    ],
)
def test_a_failed_run_is_marked_with_its_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.training.run._train", fail)
    uri = new_database(tmp_path)
    with pytest.raises(type(error)):
        train(folder, storage=str(tmp_path / "runs"), **{"tracking.uri": uri})
    client = MlflowClient(uri, uri)
    (experiment,) = client.search_experiments(filter_string="name = 'esrgan'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["esrgan.failure"]) == ("FAILED", reason)
