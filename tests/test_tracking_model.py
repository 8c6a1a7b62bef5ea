"""The registered model on a machine that has MLflow, torch or onnxruntime, and nothing of this project."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from tracking_helpers import DATA, open_small, small_generator

from pipeline.model import RRDBNet
from pipeline.storage import Storage
from pipeline.tracking import TrackedRun
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.registry import ModelCard, pull_generator, register_generator

# Runs away from the project, which cannot be imported, and where nothing can be unpickled by MLflow.
ELSEWHERE = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import os
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import numpy as np, mlflow
mlflow.set_tracking_uri({uri!r})
model = mlflow.pyfunc.load_model("models:/esrgan-x4@champion")
with np.load("in.npz") as images:
    results = {{name: model.predict(images[name]) for name in images}}
    results["tiled"] = model.predict(images["large"], params={{"tile": 48}})
np.savez("out.npz", **results)
"""


@dataclass(frozen=True)
class Registered:
    """A registered generator, and the network that it came from."""

    tracked: TrackedRun
    generator: RRDBNet


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    folder = tmp_path_factory.mktemp("served")
    tracked = open_small(TrackingConfig(), Storage(str(folder)) / "run", "served")
    generator = small_generator(folder / "generator.safetensors", 0)
    register_generator(
        tracked, TrackingConfig(), folder / "generator.safetensors", step=1, metrics={"psnr_y": 30.0},
        evaluation_set=DATA, card=ModelCard("a: 1\n", DATA),
    )  # fmt: skip
    return Registered(tracked, generator)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "small": random.integers(0, 256, (2, 17, 9, 3), dtype=np.uint8),
        "large": random.integers(0, 256, (1, 160, 131, 3), dtype=np.uint8),
    }


def in_project(generator: RRDBNet, images: np.ndarray) -> np.ndarray:
    """What the network gives here, as uint8 (N, 4H, 4W, 3)."""
    with torch.inference_mode():
        result = generator.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def elsewhere(
    folder: Path, registered: Registered, images: dict[str, np.ndarray], blocked: list[str]
) -> dict:
    """The model's results in a process that has no project."""
    np.savez(folder / "in.npz", **images)
    code = ELSEWHERE.format(blocked=[*blocked, "safetensors", "pipeline"], uri=registered.tracked.uri)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as results:
        return dict(results)


def most_different(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference in levels."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [["onnxruntime"], ["torch"]], ids=["torch alone", "onnxruntime alone"])
def test_it_gives_the_same_pixels_with_mlflow_and(tmp_path, registered, images, blocked) -> None:
    results = elsewhere(tmp_path, registered, images, blocked)
    for name in ("small", "large"):
        expected = in_project(registered.generator, images[name])
        assert expected.std() > 5  # There is something to compare.
        assert results[name].dtype == np.uint8
        assert results[name].shape == expected.shape
        assert most_different(results[name], expected) <= 1
    assert most_different(results["tiled"], results["large"]) <= 1


@pytest.fixture(scope="module")
def model(registered: Registered) -> mlflow.pyfunc.PyFuncModel:
    weights = pull_generator("models:/esrgan-x4@champion", registered.tracked.uri)
    return mlflow.pyfunc.load_model(str(weights.parent.parent), model_config={"device": "cpu"})


def test_its_input_example_and_signature_are_true(model) -> None:
    folder = model._model_meta
    example = folder.load_input_example()
    result = model.predict(example)
    assert example.dtype == np.uint8
    assert result.shape == (1, 4 * example.shape[1], 4 * example.shape[2], 3)
    (inputs,), (outputs,) = folder.signature.inputs.inputs, folder.signature.outputs.inputs
    assert inputs.shape == outputs.shape == (-1, -1, -1, 3)
    assert inputs.type == outputs.type == np.uint8
    assert [(param.name, param.default) for param in folder.signature.params.params] == [("tile", 0)]


@pytest.mark.parametrize(
    ("size", "tile"),
    [((1, 1), 1), ((3, 50), 1), ((3, 50), 48), ((49, 48), 48), ((97, 20), 17), ((97, 20), 1000)],
)
def test_tiles_change_at_most_a_level(model, size, tile) -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    assert most_different(model.predict(image, params={"tile": tile}), model.predict(image)) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
        np.zeros((1, 0, 8, 3), np.uint8),
    ],
    ids=["floats", "no batch", "four channels", "empty"],
)
def test_wrong_images_are_refused(model, wrong) -> None:
    with pytest.raises(Exception, match=r"(?i)expected|incompatible|shape"):
        model.predict(wrong)


def test_a_negative_tile_is_refused(model) -> None:
    with pytest.raises(ValueError, match="tile=-1"):
        model.predict(np.zeros((1, 8, 8, 3), np.uint8), params={"tile": -1})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_pixels(registered, images, monkeypatch) -> None:
    # TF32 would round the convolutions' inputs to 10 bits; the comparison is about the network.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    weights = pull_generator("models:/esrgan-x4@champion", registered.tracked.uri)
    model = mlflow.pyfunc.load_model(str(weights.parent.parent), model_config={"device": "cuda"})
    for given in images.values():
        assert most_different(model.predict(given), in_project(registered.generator, given)) <= 1
