"""MATLAB's bicubic: the reference images, and exact arithmetic on images of many sizes."""

from fractions import Fraction

import numpy as np
import pytest

from pipeline.imaging import (
    bicubic_upscale,
    float_bicubic_downscale,
    matlab_bicubic_downscale,
    psnr,
)
from pipeline.imaging.bicubic import Edge

Reference = dict[str, np.ndarray]
EDGES: list[Edge] = ["replicate", "symmetric"]


def kernel(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    if x <= 2:
        return Fraction(-1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
    return Fraction(0)


def resized_length(line: list[int], factor: Fraction, edge: str) -> list[int]:
    """One line of pixels as `imresize` defines it, in exact arithmetic, rounded half up."""
    width = 4 / min(factor, Fraction(1))
    result = []
    for output in range(int(len(line) * factor)):
        center = (output + Fraction(1, 2)) / factor - Fraction(1, 2)
        taps = range(int((center - width / 2) // 1), int((center + width / 2) // 1) + 2)
        weights = [kernel(min(factor, Fraction(1)) * (center - tap)) for tap in taps]
        value = Fraction(0)
        for tap, weight in zip(taps, weights, strict=True):
            if edge == "replicate":
                pixel = line[min(max(tap, 0), len(line) - 1)]
            else:
                pixel = (line + line[::-1])[tap % (2 * len(line))]
            value += weight * pixel
        rounded = (value / sum(weights) + Fraction(1, 2)) // 1
        result.append(int(min(max(rounded, 0), 255)))
    return result


def resized(image: np.ndarray, factor: Fraction, edge: str) -> np.ndarray:
    rows = np.apply_along_axis(lambda line: resized_length([int(v) for v in line], factor, edge), 0, image)
    return np.apply_along_axis(lambda line: resized_length([int(v) for v in line], factor, edge), 1, rows)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Extreme levels, so that overshoot is clipped to uint8."""
    draws = np.random.default_rng([seed, height, width]).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    return np.where(draws < 90, 0, np.where(draws > 160, 255, draws)).astype(np.uint8)


@pytest.mark.parametrize("edge", EDGES)
def test_downscaled_photo_equals_the_reference(reference: Reference, edge: Edge) -> None:
    lr = matlab_bicubic_downscale(reference["photo_hr"], 4, edge)
    np.testing.assert_array_equal(lr, reference[f"photo_lr_{edge}"])


def test_float_variant_equals_the_reference(reference: Reference) -> None:
    difference = np.abs(
        float_bicubic_downscale(reference["photo_hr"]).astype(int) - reference["photo_lr_float"]
    )
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("units", [(1, 1), (1, 9), (2, 3), (8, 5), (17, 1)])
def test_downscaling_equals_exact_arithmetic(units: tuple[int, int], scale: int, edge: Edge) -> None:
    hr = noise(units[0] * scale, units[1] * scale, channels=2)
    np.testing.assert_array_equal(
        matlab_bicubic_downscale(hr, scale, edge), resized(hr, Fraction(1, scale), edge), strict=False
    )


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 4)])
def test_upscaling_equals_exact_arithmetic(size: tuple[int, int], scale: int, edge: Edge) -> None:
    lr = noise(*size, channels=2)
    np.testing.assert_array_equal(bicubic_upscale(lr, scale, edge), resized(lr, Fraction(scale), edge))


def slow_downscale(hr: np.ndarray, scale: int, edge: Edge) -> np.ndarray:
    """The same in double precision, tap by tap."""
    before = 2 * scale
    taps = [kernel((Fraction(k - before) - Fraction(scale - 1, 2)) / scale) / scale for k in range(5 * scale)]
    for axis in (0, 1):
        image = np.moveaxis(hr, axis, 0).astype(np.float64)
        mode = {"replicate": "edge", "symmetric": "symmetric"}[edge]
        padded = np.pad(image, ((before, 3 * scale), (0, 0), (0, 0)), mode=mode)
        count = image.shape[0] // scale
        values = sum(float(w) * padded[k : k + scale * (count - 1) + 1 : scale] for k, w in enumerate(taps))
        hr = np.moveaxis(np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8), 0, axis)
    return hr


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_large_images_equal_double_precision(scale: int, edge: Edge) -> None:
    for seed, (height, width) in enumerate([(100, 61), (64, 150), (540, 41)]):
        hr = noise(height * scale, width * scale, seed=seed)
        np.testing.assert_array_equal(
            matlab_bicubic_downscale(hr, scale, edge), slow_downscale(hr, scale, edge)
        )


def test_constant_images_stay_constant() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 1, 3)
    for level in levels:
        plain = np.tile(level, (12, 12, 1))
        for scale in (2, 3, 4):
            assert (matlab_bicubic_downscale(plain, scale) == level).all()
            assert (bicubic_upscale(plain[:2, :2], scale) == level).all()


def test_views_give_the_same_result_as_copies() -> None:
    hr = noise(64, 64)
    view = hr[8:40, 4:60][:, ::-1]
    np.testing.assert_array_equal(matlab_bicubic_downscale(view), matlab_bicubic_downscale(view.copy()))
    assert hr.tobytes() == noise(64, 64).tobytes()


def test_bicubic_is_the_papers_baseline(reference: Reference) -> None:
    up = bicubic_upscale(reference["photo_lr_replicate"])
    assert up.shape == reference["photo_hr"].shape
    # Pillow's bicubic of nearly the same image gives 27.562 dB.
    assert psnr(up, reference["photo_hr"]) == pytest.approx(27.57, abs=0.05)


@pytest.mark.parametrize(
    ("image", "scale", "edge", "message"),
    [
        (np.zeros((8, 10, 3), np.uint8), 4, "replicate", "8 x 10 pixels.*cut the image to 8 x 8"),
        (np.zeros((8, 8), np.uint8), 4, "replicate", r"expected uint8 \(H, W, channels\)"),
        (np.zeros((8, 8, 3), np.float32), 4, "replicate", "float32"),
        (np.zeros((0, 8, 3), np.uint8), 4, "replicate", "expected uint8"),
        (np.zeros((10, 10, 3), np.uint8), 5, "replicate", "scale=5"),
        (np.zeros((8, 8, 3), np.uint8), 4, "wrap", "edge='wrap'"),
    ],
)
def test_invalid_input_raises_a_clear_error(image: np.ndarray, scale: int, edge: Edge, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matlab_bicubic_downscale(image, scale, edge)
