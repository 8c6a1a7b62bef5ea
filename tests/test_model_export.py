"""The ONNX file computes the generator's images, at any size."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.errors import UserError
from pipeline.imaging import upscale
from pipeline.model import RRDBNet, seeded
from pipeline.model.export import Images, export_onnx


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


@pytest.mark.parametrize("scale", [4, 2, 1])
@pytest.mark.parametrize("images", ["fp32", "fp16"])
def test_float_onnx_is_within_one_level_at_any_size(tmp_path: Path, images: Images, scale: int) -> None:
    generator = seeded(0, lambda: RRDBNet(16, 3, 8, scale=scale))
    generator.conv_last.weight.data.mul_(50)
    generator.conv_last.bias.data.fill_(0.5)
    export_onnx(generator, tmp_path / "g.onnx", images)
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    expected_type = {"fp32": "tensor(float)", "fp16": "tensor(float16)"}[images]
    assert given.type == result.type == expected_type
    assert given.shape == ["N", 3, "H", "W"]
    assert result.shape == ["N", 3, "H_out", "W_out"]
    dtype = {"fp32": np.float32, "fp16": np.float16}[images]
    for size in [(1, 8, 20), (2, 36, 16)]:
        lr = np.random.default_rng(size).random((size[0], 3, *size[1:]), dtype=np.float32)
        (sr,) = session.run(None, {given.name: lr.astype(dtype)})
        with torch.inference_mode():
            expected = generator(torch.from_numpy(lr)).clamp(0, 1).numpy()
        assert {0.0, 1.0} <= set(expected.ravel().tolist())  # Clamped at both ends.
        assert sr.dtype == dtype
        assert sr.shape == expected.shape
        assert np.abs(sr.astype(np.float32) - expected).max() <= 1 / 255


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


def test_without_the_package_onnx_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"^an ONNX file: the package onnx is not installed; install it, or"):
        export_onnx(seeded(0, lambda: RRDBNet(4, 1, 2)), tmp_path / "g.onnx")
    assert list(tmp_path.iterdir()) == []


def test_several_threads_may_export(tmp_path: Path) -> None:
    generator = seeded(0, lambda: RRDBNet(8, 4, 4))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: export_onnx(generator, tmp_path / name), "abcd"))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
