"""The ONNX file computes the generator's images, at any size."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline.imaging import upscale
from pipeline.model import RRDBNet, seeded
from pipeline.model.export import export_onnx


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_onnx_computes_the_generators_images(tmp_path: Path, scale: int) -> None:
    generator = seeded(0, lambda: RRDBNet(8, 2, 4, residual_scale=0.3, scale=scale))
    export_onnx(generator, tmp_path / "g.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    for size in [(1, 4, 4), (3, 8, 20), (2, 36, 16)] + ([(1, 1, 1), (2, 7, 13)] if scale == 4 else []):
        lr = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
        (sr,) = session.run(["sr"], {"lr": lr})
        expected = np.stack([upscale(generator, image) for image in lr])
        assert sr.dtype == np.uint8
        assert sr.shape == expected.shape
        assert np.abs(sr.astype(int) - expected).max() <= 1


def test_onnx_clamps_to_the_range_of_uint8(tmp_path: Path) -> None:
    generator = seeded(0, lambda: RRDBNet(4, 1, 2))
    generator.conv_last.weight.data.mul_(100)
    export_onnx(generator, tmp_path / "g.onnx")
    lr = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    (sr,) = session.run(None, {"lr": lr})
    assert {0, 255} <= set(sr.ravel().tolist())
    assert np.abs(sr[0].astype(int) - upscale(generator, lr[0])).max() <= 1


def test_the_same_generator_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(seeded(0, lambda: RRDBNet(4, 1, 2)), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_several_threads_may_export(tmp_path: Path) -> None:
    generator = seeded(0, lambda: RRDBNet(8, 4, 4))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: export_onnx(generator, tmp_path / name), "abcd"))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
