"""The registered model in a process with MLflow, torch or onnxruntime, and without this project."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from PIL import Image
from tracking_helpers import free_port, new_database, open_small, register, small_generator, wait_until

from pipeline.imaging import upscale
from pipeline.model import RRDBNet, rrdbnet, save_generator, seeded
from pipeline.model.export import export_onnx
from pipeline.model.weights import architecture
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.serving_model import Generator

DOCS = Path(__file__).parent.parent / "docs"
# Runs in another folder: the project cannot be imported, and MLflow must not unpickle anything.
OUTSIDE_CODE = """
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
    """A registered generator, and its network."""

    tracked: TrackedRun
    generator: RRDBNet


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    folder = tmp_path_factory.mktemp("served")
    new_database(folder)
    tracked = open_small(TrackingConfig(), Storage(str(folder)) / "run", "served")
    generator = small_generator(folder / "generator.safetensors", 0)
    register(tracked, folder / "generator.safetensors", 1, {"psnr_y": 30.0})
    return Registered(tracked, generator)


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "small": random.integers(0, 256, (2, 17, 9, 3), dtype=np.uint8),
        "large": random.integers(0, 256, (1, 160, 131, 3), dtype=np.uint8),
    }


def run_here(generator: RRDBNet, images: np.ndarray) -> np.ndarray:
    """The network's result in this process, uint8 (N, 4H, 4W, 3)."""
    with torch.inference_mode():
        result = generator.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return (result.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def run_outside(
    folder: Path, registered: Registered, images: dict[str, np.ndarray], blocked: list[str]
) -> dict:
    """The model's results in a process without the project."""
    np.savez(folder / "in.npz", **images)
    code = OUTSIDE_CODE.format(blocked=[*blocked, "safetensors", "pipeline"], uri=registered.tracked.uri)
    finished = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "hint" not in finished.stderr  # MLflow's warnings about those of `predict`
    with np.load(folder / "out.npz") as results:
        return dict(results)


def max_difference(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference, in levels."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [["onnxruntime"], ["torch"]], ids=["torch alone", "onnxruntime alone"])
def test_the_pixels_are_equal_with_mlflow_and(tmp_path, registered, images, blocked) -> None:
    results = run_outside(tmp_path, registered, images, blocked)
    for name in ("small", "large"):
        expected = run_here(registered.generator, images[name])
        assert expected.std() > 5  # Not a constant image.
        assert results[name].dtype == np.uint8
        assert results[name].shape == expected.shape
        assert max_difference(results[name], expected) <= 1
    assert max_difference(results["tiled"], results["large"]) <= 1


@pytest.fixture(scope="module")
def model(registered: Registered) -> mlflow.pyfunc.PyFuncModel:
    weights = pull_generator("models:/esrgan-x4@champion", registered.tracked.uri)
    return mlflow.pyfunc.load_model(str(weights.parent.parent), model_config={"device": "cpu"})


def test_the_model_carries_the_generators_own_definition(model, registered) -> None:
    weights = pull_generator("models:/esrgan-x4@champion", registered.tracked.uri)
    assert (weights.parent / "rrdbnet.py").read_bytes() == Path(rrdbnet.__file__).read_bytes()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("scale", [4, 2, 1])
def test_every_scale_takes_any_height_and_width(tmp_path, monkeypatch, scale, backend) -> None:
    generator = seeded(0, lambda: RRDBNet(8, 2, 4, scale=scale))
    generator.conv_last.weight.data.mul_(10)
    generator.conv_last.bias.data.fill_(0.5)
    paths = {name: tmp_path / name for name in ("architecture", "onnx", "weights.safetensors")}
    paths["architecture"].write_text(json.dumps(architecture(generator)))
    save_generator(generator, paths["weights.safetensors"])
    export_onnx(generator, paths["onnx"])
    if backend == "onnxruntime":
        monkeypatch.setitem(sys.modules, "torch", None)
    served = Generator()
    artifacts = {name.split(".")[0]: str(path) for name, path in paths.items()} | {"code": rrdbnet.__file__}
    served.load_context(SimpleNamespace(artifacts=artifacts, model_config={"device": "cpu"}))
    monkeypatch.undo()
    for tile in (0, 5):
        lr = np.random.default_rng(0).integers(0, 256, (1, 13, 7, 3), dtype=np.uint8)
        expected = upscale(generator, lr[0])
        assert expected.std() > 5  # Not a constant image.
        assert max_difference(served.predict(None, lr, {"tile": tile})[0], expected) <= 1


def test_its_input_example_and_signature_match_its_results(model) -> None:
    folder = model._model_meta
    example = folder.load_input_example()
    result = model.predict(example)
    assert result.dtype == np.uint8
    assert result.shape == (1, 4 * example.shape[1], 4 * example.shape[2], 3)
    (outputs,) = folder.signature.outputs.inputs
    assert (outputs.shape, outputs.type) == ((-1, -1, -1, 3), np.uint8)
    assert [(param.name, param.default) for param in folder.signature.params.params] == [("tile", -1)]


@pytest.mark.parametrize(
    ("size", "tile"),
    [((1, 1), 1), ((3, 50), 1), ((3, 50), 48), ((49, 48), 48), ((97, 20), 17), ((97, 20), 1000)],
)
def test_tiles_change_pixels_by_at_most_one_level(model, size, tile) -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    assert max_difference(model.predict(image, params={"tile": tile}), model.predict(image)) <= 1


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


def png_base64(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_base64_images_of_any_size_give_base64_png(model, images) -> None:
    first, second = images["small"][0], images["large"][0]
    texts = [png_base64(first), f"data:image/png;base64,{png_base64(second)}"]
    results = [decoded(text) for text in model.predict(texts)]
    np.testing.assert_array_equal(results[0], model.predict(first[None])[0])
    np.testing.assert_array_equal(results[1], model.predict(second[None])[0])


def test_a_16_bit_gray_png_is_scaled_to_8_bits(model) -> None:
    levels = np.random.default_rng(2).integers(0, 256, (9, 7), dtype=np.uint8)
    deep = png_base64(levels.astype(np.uint16) * 257)
    (sr,) = model.predict([deep])
    gray = np.repeat(levels[None, ..., None], 3, axis=3)
    np.testing.assert_array_equal(decoded(sr), model.predict(gray)[0])


def test_base64_may_be_bytes(model, images) -> None:
    text = png_base64(images["small"][0])
    served = model.unwrap_python_model()
    assert served.predict(None, [text.encode()]) == served.predict(None, [text])
    with pytest.raises(ValueError, match="expected base64 of a PNG"):
        served.predict(None, [b"\xff\xfe"])


def test_other_integers_are_uint8(model, images) -> None:
    np.testing.assert_array_equal(
        model.predict(images["small"].astype(np.int64)), model.predict(images["small"])
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full((1, 8, 8, 3), 0.5), "expected integers from 0 to 255, got float64 from 0.5 to 0.5"),
        (np.full((1, 8, 8, 3), 300), "expected integers from 0 to 255, got 300 to 300"),
        (np.full((1, 8, 8, 3), -1), "got -1 to -1"),
        (["not base64!"], "expected base64 of a PNG, JPEG or WebP file, got 'not base64!'"),
        ([base64.b64encode(b"<html>").decode()], "expected base64 of a PNG"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(model, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(wrong)


def test_large_images_are_tiled_by_default(model, monkeypatch) -> None:
    served = model.unwrap_python_model()
    monkeypatch.setitem(vars(sys.modules[type(served).__module__]), "WHOLE_UP_TO_PX", 1000)
    monkeypatch.setitem(vars(sys.modules[type(served).__module__]), "AUTO_TILE_PX", 16)
    sizes = []
    upscale_once = served.upscale
    monkeypatch.setattr(served, "upscale", lambda lr: (sizes.append(lr.shape), upscale_once(lr))[1])
    served.predict(None, np.zeros((1, 40, 30, 3), np.uint8))
    assert len(sizes) == 6
    sizes.clear()
    served.predict(None, np.zeros((5, 20, 20, 3), np.uint8))
    assert [shape[0] for shape in sizes] == [2, 2, 1]
    sizes.clear()
    served.predict(None, np.zeros((1, 40, 30, 3), np.uint8), {"tile": 0})
    assert sizes == [(1, 40, 30, 3)]


def test_a_server_needs_no_torch(model) -> None:
    folder = Path(model._model_meta.artifact_path.removeprefix("file://"))
    requirements = (folder / "requirements.txt").read_text()
    assert "torch" not in requirements
    assert {"onnxruntime", "pillow", "numpy", "mlflow"} <= set(re.findall(r"^[a-z]+", requirements, re.M))


@pytest.mark.slow
def test_the_commands_in_the_docs_call_a_server(registered, tmp_path) -> None:
    section = (DOCS / "tracking.md").read_text().split("## Serving")[1].split("\n## ")[0]
    start, call = re.findall(r"```\n(.*?)```", section, re.S)
    port = free_port()
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "small.png")
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": registered.tracked.uri,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        ["bash", "-c", "exec " + start.strip().replace("5001", str(port)).replace("\\\n", "")],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        wait_until(lambda: is_healthy(port))
        subprocess.run(
            ["bash", "-c", call.replace("5001", str(port))],
            env=environment,
            cwd=tmp_path,
            check=True,
            timeout=300,
        )
        sr = np.asarray(Image.open(tmp_path / "large.png"))
        assert max_difference(sr, run_here(registered.generator, image[None])[0]) <= 1
        status, text = post(port, {"inputs": (image / 255).tolist()})
        assert (status, "expected images (N, H, W, 3)" in text) == (400, True)
        status, text = post(port, {"inputs": [(image / 255).tolist()]})
        assert (status, "expected integers from 0 to 255, got float64" in text) == (400, True)
        status, text = post(port, {"inputs": [image.tolist()], "params": {"tile": 0}})
        assert status == 200
        assert np.array(json.loads(text)["predictions"]).shape == (1, 36, 48, 3)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(port: int, payload: dict) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_negative_tile_is_refused(model) -> None:
    with pytest.raises(ValueError, match="tile=-2"):
        model.predict(np.zeros((1, 8, 8, 3), np.uint8), params={"tile": -2})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_pixels_are_equal_on_a_gpu(registered, images, monkeypatch) -> None:
    # TF32 would round the convolutions' inputs to 10 bits; the comparison is about the network.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    weights = pull_generator("models:/esrgan-x4@champion", registered.tracked.uri)
    model = mlflow.pyfunc.load_model(str(weights.parent.parent), model_config={"device": "cuda"})
    for batch in images.values():
        assert max_difference(model.predict(batch), run_here(registered.generator, batch)) <= 1
