"""The model card: what it states, and its example."""

import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from tracking_helpers import candidate, new_database, open_small, small_generator

from pipeline.imaging import upscale
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.logged_model import log_model
from pipeline.tracking.run import TrackedRun


@pytest.fixture
def tracked(tmp_path: Path) -> TrackedRun:
    return open_small(TrackingConfig(uri=new_database(tmp_path)), Storage(str(tmp_path / "run")), "a")


def logged(tracked: TrackedRun, tmp_path: Path, metrics: dict[str, float]) -> tuple[str, str, str]:
    """The description for the registry, the card among the model's files, and the model's id."""
    client = mlflow.MlflowClient(tracked.uri, tracked.uri)
    weights = tmp_path / "g.safetensors"
    described = candidate(tracked, weights, 600, metrics, data="12 photos", bicubic={"psnr_y": 26.25})
    trained = described.description.generator
    result = log_model(client, tracked, described, trained, weights.read_bytes())
    return (
        result.description,
        (Path(result.model.artifact_location) / "README.md").read_text(),
        result.model.model_id,
    )


def test_the_card_states_what_the_model_is(tmp_path: Path, tracked: TrackedRun) -> None:
    generator = small_generator(tmp_path / "g.safetensors", 0)
    texts = logged(tracked, tmp_path, {"psnr_y": 26.5, "lpips": 0.3})
    count = sum(parameter.numel() for parameter in generator.parameters())
    for text in texts[:2]:
        assert "| held out | bicubic | 26.25 |  |" in text
        assert "| held out | **this model** | 26.50 | 0.3000 |" in text
        assert "this one was chosen by PSNR (Y) on the held-out images." in text
        assert "Trained on 12 photos; weights of step 600." in text
        assert f"| parameters | {count:,} ({count * 4 / 1e6:.1f} MB) |" in text
        assert re.search(r"\| speed \| [\d,]+ ms per megapixel of output \(\w+, \d+ CPU threads\) \|", text)
        assert "expected input" in text
        assert "## License" in text


def test_the_cards_example_loads_the_model_of_the_card(
    tmp_path: Path, tracked: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = small_generator(tmp_path / "g.safetensors", 0)
    _, text, model_id = logged(tracked, tmp_path, {})  # as stage 1's, which is never registered
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert f'"models:/{model_id}"' in example
    lr = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(lr).save(tmp_path / "small.png")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", before)  # set_tracking_uri changes it
    try:
        exec(example, {})  # what a reader would run
    finally:
        mlflow.set_tracking_uri(before)
    difference = np.asarray(Image.open("large.png")).astype(int) - upscale(generator, lr).astype(int)
    assert np.abs(difference).max() <= 1
