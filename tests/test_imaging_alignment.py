"""Low-resolution files that do not belong to their HR image."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

from pipeline.data.config import DataConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.ingest.decoding import PhotoRejected
from pipeline.data.ingest.image_set import Pair, read_pair
from pipeline.data.ingest.prepare import prepare
from pipeline.imaging import matlab_bicubic_downscale
from pipeline.imaging.alignment import pair_fault


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:400, :480])


@pytest.fixture(scope="module")
def lr(hr: np.ndarray) -> np.ndarray:
    return matlab_bicubic_downscale(hr)


def test_the_reduced_image_and_its_degradations_are_accepted(hr: np.ndarray, lr: np.ndarray) -> None:
    noise = np.random.default_rng(0).normal(0, 30, lr.shape)
    degraded = {
        "bicubic": lr,
        "subsampled": hr[::4, ::4],
        "area": np.asarray(Image.fromarray(hr).resize((120, 100), Image.Resampling.BOX)),
        "blurred": np.asarray(Image.fromarray(lr).filter(ImageFilter.GaussianBlur(2))),
        "noisy": (lr + noise).clip(0, 255).astype(np.uint8),
        "darker": lr // 2,
        "flat": np.full_like(lr, 90),
    }
    assert {name: pair_fault(hr, image, 4) for name, image in degraded.items()} == dict.fromkeys(degraded, "")


def test_another_image_is_named(hr: np.ndarray) -> None:
    other = matlab_bicubic_downscale(np.ascontiguousarray(skimage.data.immunohistochemistry()[:400, :480]))
    assert "shows another image (correlation" in pair_fault(hr, other, 4)


@pytest.mark.parametrize(("down", "right"), [(0, 1), (1, 0), (-1, 2), (-2, -2)])
def test_a_shift_is_named_with_its_direction(hr: np.ndarray, lr: np.ndarray, down: int, right: int) -> None:
    shifted = np.roll(lr, (down, right), (0, 1))
    assert f"is shifted by {right} pixels to the right and {down} down" in pair_fault(hr, shifted, 4)


def test_evaluation_and_ingest_reject_a_shifted_file(tmp_path: Path, hr: np.ndarray, lr: np.ndarray) -> None:
    for folder, image in (("hr", hr), ("lr", np.roll(lr, 1, 1))):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / "a.png")
    with pytest.raises(PhotoRejected, match="shifted by 1 pixels"):
        read_pair(Pair("a.png", str(tmp_path / "hr" / "a.png"), str(tmp_path / "lr" / "a.png")), 4, 4)
    for name in ("b", "c"):
        Image.fromarray(hr[::-1] if name == "b" else hr[:, ::-1]).save(tmp_path / "hr" / f"{name}.png")
        low = matlab_bicubic_downscale(np.ascontiguousarray(hr[::-1] if name == "b" else hr[:, ::-1]))
        Image.fromarray(low).save(tmp_path / "lr" / f"{name}.png")
    config = DataConfig(
        source=str(tmp_path / "hr"),
        lr_dir=str(tmp_path / "lr"),
        root=str(tmp_path / "data"),
        patch_px=128,
        patch_stride_px=64,
        max_rejected_share=1.0,
    )
    prepare(config, on_ray=False)
    (rejected,) = load_manifest(str(tmp_path / "data")).rejected
    assert rejected["path"] == "a.png"
    assert "shifted by 1 pixels to the right and 0 down (a.png)" in rejected["reason"]
