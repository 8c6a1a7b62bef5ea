"""What metrics.json records of the models and of the protocol, and the labels of models."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import job, user_error, write_generator, write_image
from tracking_helpers import new_database, open_small, register

from pipeline.evaluation.models import open_model, split_label
from pipeline.model import generator_sha256
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import version_uri


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_image(tmp_path / "hr" / "a.png", 64, 80)
    return write_generator(tmp_path / "g.safetensors")


def evaluated(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    hr, out = tmp_path / "hr", tmp_path / "out"
    job("evaluate")(["--hr", str(hr), "--out", str(out), *map(str, arguments)])
    return json.loads((out / "metrics.json").read_text())


def test_the_record_has_the_weights_digest_and_the_protocol(tmp_path: Path, weights: Path) -> None:
    record = evaluated(tmp_path, "--model", "bicubic", f"mine={weights}", "--tile", "32")
    bicubic, mine = record["models"]
    generator = open_model(str(weights)).generator
    assert generator is not None
    assert mine["generator_sha256"] == generator_sha256(generator.state_dict())
    assert (mine["model"], mine["label"], mine["origin"]) == (str(weights), "mine", str(weights))
    assert (mine["num_feat"], mine["residual_scale"], mine["scale"]) == ("8", "0.2", "4")
    assert "generator_sha256" not in bicubic
    protocol = record["protocol"]
    assert protocol["lr"] == "computed from the HR images by MATLAB's bicubic"
    assert (protocol["scale"], protocol["border"], protocol["tile_px"]) == (4, 4, 32)
    assert (protocol["hr"], protocol["images"]) == (str(tmp_path / "hr"), 1)
    assert protocol["versions"].keys() >= {"torch", "numpy"}
    assert protocol["date"].endswith("+00:00")


def test_the_record_names_the_lr_files(tmp_path: Path, weights: Path) -> None:
    write_image(tmp_path / "lr" / "a.png", 16, 20)
    record = evaluated(tmp_path, "--model", weights, "--lr", tmp_path / "lr")
    assert record["protocol"]["lr"] == str(tmp_path / "lr")


def test_a_runs_checkpoint_is_recorded(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "gan-00000010"
    folder.mkdir(parents=True)
    content = weights.read_bytes()
    (folder / "generator.safetensors").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    content_of = {"format": 1, "files": {"generator.safetensors": entry}}
    (folder / "manifest.json").write_text(json.dumps(content_of))
    assert evaluated(tmp_path, "--model", folder)["origin"] == str(folder)


def test_the_version_of_an_alias_is_recorded(tmp_path: Path, weights: Path) -> None:
    tracked = open_small(TrackingConfig(uri=new_database(tmp_path)), Storage(str(tmp_path / "run")), "a")
    register(tracked, weights, 1, {"psnr_y": 30.0})
    uri = "models:/esrgan-x4@champion"
    assert version_uri(uri, tracked.uri) == "models:/esrgan-x4/1"
    record = evaluated(tmp_path, "--model", uri, "--tracking.uri", tracked.uri)
    assert (record["model"], record["origin"]) == (uri, "models:/esrgan-x4/1")


def test_two_models_of_one_label_are_an_error(tmp_path: Path, weights: Path) -> None:
    for models in ([f"a={weights}", "a=bicubic"], [weights, weights]):
        text = user_error("evaluate", "--model", *models, "--hr", tmp_path / "hr", "--out", tmp_path / "out")
        assert "two models have the label" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("v1.0=RUN", ("v1.0", "RUN")),
        ("stage 1=runs/a=b/model.pth", ("stage 1", "runs/a=b/model.pth")),
        ("models:/a=b@champion", ("", "models:/a=b@champion")),
        ("runs/lr=1/g.pth", ("", "runs/lr=1/g.pth")),
        ("=a", ("", "=a")),
        ("a=", ("", "a=")),
    ],
)
def test_labels(source: str, expected: tuple[str, str]) -> None:
    assert split_label(source) == expected


def test_an_existing_path_with_an_equals_sign_has_no_label(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("lr=0.0002") / "g.pth"
    path.parent.mkdir()
    path.write_bytes(weights.read_bytes())
    assert split_label(str(path)) == ("", str(path))
    assert evaluated(tmp_path, "--model", path)["model"] == str(path)
