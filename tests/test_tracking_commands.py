"""The commands about tracking: what they print, write and refuse."""

import json
import sys
from pathlib import Path

import pytest
from tracking_helpers import DATA, new_database, open_small, small_generator, write_segments

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.model_card import ModelCard
from pipeline.tracking.registry import register_generator
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.uri import remember_uri

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
        register_generator(
            tracked, TrackingConfig(), storage / f"{seed}.safetensors", step=seed, metrics={"psnr_y": 31.0 - seed},
            evaluation_set=DATA, card=ModelCard("", DATA),
        )  # fmt: skip
    write_segments(run, 20)
    run.write_bytes("checkpoints/psnr-00000020/manifest.json", b"{}")
    return tracked


def test_promote_moves_the_champion_and_prints_the_previous_one(
    tracked: TrackedRun, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out.json"
    promote.main(["--model-version", "2", "--tracking.uri", tracked.uri, "--json", str(out)])
    assert capsys.readouterr().out == "champion of esrgan-x4: version 2 (it was version 1)\n"
    assert json.loads(out.read_text()) == {"model_name": "esrgan-x4", "champion": 2, "was": 1}


def test_promote_uses_the_database_next_to_the_runs(tracked: TrackedRun, capsys) -> None:
    storage = str(Path(tracked.folder).parent)
    promote.main(["--model-version", "1", "--storage", storage])
    assert "champion of esrgan-x4: version 1" in capsys.readouterr().out


def test_promote_uses_the_store_of_the_last_run(tracked: TrackedRun, capsys, monkeypatch) -> None:
    for name in ("ESRGAN_TRACKING__URI", "MLFLOW_TRACKING_URI", "ESRGAN_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    remember_uri(tracked.uri)
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
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"2 segments sent; run {tracked.run_id} is marked RUNNING"
    assert second.startswith("nothing to send")


def test_send_metrics_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        send_metrics.main(["--run", str(tmp_path)])
