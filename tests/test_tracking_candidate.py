"""The generator of a finished run is kept in its folder until it is registered."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from s3 import s3_bucket
from tracking_helpers import (
    DATA,
    client_of,
    free_port,
    new_database,
    open_small,
    small_generator,
    write_segments,
)

from pipeline.errors import UserError
from pipeline.run_folder import RESULT, CandidateDescription, TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.candidate import Candidate, trained_generator
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.registry import register_candidate
from pipeline.tracking.run import finish_run, open_run
from pipeline.tracking.spool import images_at

sys.path.insert(0, str(Path(__file__).parent.parent / "jobs"))
import send_metrics


def candidate_of(run: Storage, folder: Path) -> Candidate:
    """Writes generators of two stages into the run's folder; returns the candidate to be registered."""
    generators = []
    for step in (10, 20):
        path = folder / f"{step}.safetensors"
        small_generator(path, step)
        run.write_bytes(f"checkpoints/gan-{step:08d}/generator.safetensors", path.read_bytes())
        generators.append(
            trained_generator(
                run, f"checkpoints/gan-{step:08d}/generator.safetensors", step, {"psnr_y": 20.0 + step}
            )
        )
    run.write_bytes("checkpoints/gan-00000020/manifest.json", b"{}")
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    description = CandidateDescription(
        model_name="candidate-x4",
        metric="psnr_y",
        generator=generators[1],
        earlier=generators[:1],
        evaluation_set=DATA,
        config_text="uri: http://me:geheim@host\n",
        data_sha256=DATA,
        license="CC0",
    )
    return Candidate(description, {"flower": noise})


def test_a_candidate_is_read_back_as_it_was_without_secrets(tmp_path: Path) -> None:
    run = Storage(str(tmp_path)) / "run"
    assert Candidate.load(run) is None
    saved = candidate_of(run, tmp_path)
    saved.save(run)
    loaded = Candidate.load(run)
    assert loaded is not None
    assert loaded.description == replace(
        saved.description, config_text="uri: http://***@host\n", images=["flower"]
    )
    assert np.array_equal(loaded.images["flower"], saved.images["flower"])
    run.write_bytes("tracking/candidate/candidate.json", b"{")
    with pytest.raises(UserError, match=r"candidate\.json: corrupt \(.+\); start the training again"):
        Candidate.load(run)
    saved.save(run)
    run.write_bytes("tracking/candidate/image-0.png", b"not an image")
    with pytest.raises(UserError, match=r"candidate: corrupt \(.+\); start the training again"):
        Candidate.load(run)
    Candidate.discard(run)
    assert Candidate.load(run) is None


@pytest.mark.slow
def test_a_run_on_s3_registers_its_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_bucket(monkeypatch) as bucket:
        run = Storage(bucket) / "run"
        config = TrackingConfig(uri=new_database(tmp_path))
        tracked = open_small(config, run, "on-s3")
        write_segments(run, 20)
        assert list(images_at(run, 20)) == ["validation/astronaut"]
        assert images_at(run, 15) == {}
        candidate = candidate_of(run, tmp_path)
        candidate.save(run)
        assert Candidate.load(run) is not None
        registered = register_candidate(tracked, candidate)
        assert (registered.version, registered.champion) == (1, True)
    path = pull_generator("models:/candidate-x4@champion", config.uri)
    assert path.read_bytes() == (tmp_path / "20.safetensors").read_bytes()
    models = client_of(tracked).search_logged_models(
        [tracked.experiment_id], order_by=[{"field_name": "name"}]
    )
    assert [(model.name, model.metrics[0].value) for model in models] == [
        ("generator-00000010", 30.0),
        ("generator-00000020", 40.0),
    ]
    # Stage 1's result was not chosen by stage 2's metric.
    cards = [(Path(model.artifact_location) / "README.md").read_text() for model in models]
    assert ["was chosen by" in card for card in cards] == [False, True]


@pytest.mark.parametrize("content", [None, b"corrupt"])
def test_a_missing_or_corrupt_generator_is_not_registered(tmp_path: Path, content: bytes | None) -> None:
    run = Storage(str(tmp_path)) / "run"
    tracked = open_small(TrackingConfig(uri=new_database(tmp_path)), run, "corrupt")
    candidate = candidate_of(run, tmp_path)
    run.remove(candidate.description.generator.file)
    if content:
        run.write_bytes(candidate.description.generator.file, content)
    with pytest.raises(UserError, match=r"cannot be registered, its file is (missing|corrupt)"):
        register_candidate(tracked, candidate)
    assert client_of(tracked).search_registered_models() == []


def test_a_server_unreachable_throughout_training_gets_the_model_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began_ms = time.time_ns() // 1_000_000
    unreachable = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}", if_unreachable="spool")
    run = Storage(str(tmp_path)) / "run"
    opened = open_run(
        unreachable, run, run_name="late", parameters={}, tags={"esrgan.key": "late"}, config_text="a: 1\n"
    )
    assert opened is None
    write_segments(run, 20)
    candidate_of(run, tmp_path).save(run)
    result = TrainingResult(
        "late",
        None,
        "gan",
        20,
        "0" * 64,
        "checkpoints/gan-00000020",
        None,
        {"psnr_y": 40.0},
        {"psnr_y": 39.0},
    )
    RESULT.write(run, result)
    finish_run(None, "FINISHED", run)

    uri = new_database(tmp_path)
    out = tmp_path / "out.json"
    send_metrics.main(["--run", run.uri, "--tracking.uri", uri, "--json", str(out)])
    sent = json.loads(out.read_text())
    assert (sent["status"], sent["sent"], sent["model_version"]) == ("FINISHED", 2, 1)
    assert RESULT.read(run) == replace(result, run_id=sent["run_id"], model_version=1)
    assert "registered candidate-x4 version 1: there was no champion" in capsys.readouterr().out
    assert Candidate.load(run) is None
    info = MlflowClient(uri).get_run(sent["run_id"]).info
    assert began_ms <= info.start_time <= info.end_time < began_ms + 60_000
    send_metrics.main(["--run", run.uri, "--tracking.uri", uri, "--json", str(out)])
    assert json.loads(out.read_text()) == {**sent, "sent": 0, "model_version": None}
