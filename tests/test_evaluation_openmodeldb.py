"""OpenModelDB's entry of a registered model, by the rules of its src/lib/model-props.ts."""

import hashlib
import json
import re
from datetime import date
from pathlib import Path

import pytest
from evaluation_helpers import job, user_error, write_generator
from tracking_helpers import new_database, open_small, register, small_generator

from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.model_card import license_note


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking server with a registered model."""
    folder = tmp_path_factory.mktemp("openmodeldb")
    server = new_database(folder)
    tracked = open_small(TrackingConfig(), Storage(str(folder)) / "run", "openmodeldb")
    weights = folder / "generator.safetensors"
    small_generator(weights, 0)
    register(
        tracked,
        weights,
        4000,
        {"psnr_y": 30.0},
        config_text="batch_size: 8\ncrop_px: 96\n",
        data="24 images: a.png ... z.png",
        license=license_note({"train": "CC0-1.0"}),
    )
    return server


@pytest.mark.parametrize(
    ("suffix", "platform"), [("pth", "pytorch"), ("safetensors", "pytorch"), ("onnx", "onnx")]
)
def test_the_entry_describes_the_exported_file(tmp_path: Path, uri: str, suffix: str, platform: str) -> None:
    output, entry_file = tmp_path / f"4x-small.{suffix}", tmp_path / "4x-small.json"
    source = ["--model", "small=models:/esrgan-x4@champion", "--tracking.uri", uri]
    job("export_model")([*source, "--output", str(output), "--openmodeldb", str(entry_file)])
    entry = json.loads(entry_file.read_text())
    description = entry.pop("description")
    assert description == description.strip()
    assert "| held out | **this model** | 30.00 |" in description
    assert "CC0-1.0" in description
    assert "mlflow" not in description
    day = entry.pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert date.fromisoformat(day)
    content = output.read_bytes()
    assert entry == {
        "name": "4x-small",
        "author": [],
        "license": None,
        "tags": [],
        "architecture": "esrgan",
        "size": ["8nf", "2nb"],
        "scale": 4,
        "inputChannels": 3,
        "outputChannels": 3,
        "resources": [
            {
                "platform": platform,
                "type": suffix,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "urls": [],
            }
        ],
        "trainingIterations": 4000,
        "trainingBatchSize": 8,
        "trainingHRSize": 96,
        "dataset": "24 images: a.png ... z.png",
        "datasetSize": 24,
        "images": [],
    }


def test_models_without_a_card_and_unwritable_entries_are_errors(tmp_path: Path, uri: str) -> None:
    output = tmp_path / "g.pth"
    weights = write_generator(tmp_path / "g.safetensors")
    text = user_error(
        "export_model", "--model", weights, "--output", output, "--openmodeldb", tmp_path / "x.json"
    )
    assert "only registered models have a model card" in text
    text = user_error(
        "export_model", "--model", "models:/esrgan-x4@champion", "--tracking.uri", uri,
        "--output", output, "--openmodeldb", tmp_path / "no" / "x.json",
    )  # fmt: skip
    assert text.startswith(f"--openmodeldb {tmp_path}/no/x.json")
    assert not output.exists()
