"""PSNR, SSIM and color drift on the device: equal to scikit-image and to MATLAB's bicubic, for any batch."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.errors import UserError
from pipeline.imaging import (
    Image,
    bicubic_upscale,
    downscale_batch,
    luma,
    matlab_bicubic_downscale,
    psnr,
    ssim,
)
from pipeline.metrics import CONSISTENCY_AND_DETAIL, FIDELITY, METRICS, MetricSet

SIZES = [(32, 36), (60, 44), (400, 360)]  # the last one takes several strips


def pair(height: int, width: int, seed: int = 0) -> tuple[Image, Image]:
    """An image with noise, and the image."""
    draws = np.random.default_rng(seed)
    hr = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = draws.integers(-20, 21, hr.shape)
    return np.clip(hr + noise, 0, 255).astype(np.uint8), hr


def low(hr: Image) -> Image:
    return matlab_bicubic_downscale(hr)


def measured(metrics: MetricSet, sr: Image, hr: Image) -> dict[str, float]:
    (values,) = metrics.measure(sr[None], hr[None], low(hr)[None])
    return values


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("border", [0, 4])
def test_psnr_and_ssim_equal_the_reference(height: int, width: int, border: int) -> None:
    sr, hr = pair(height, width)
    values = measured(MetricSet(FIDELITY, border=border), sr, hr)
    inside = [image[border : height - border, border : width - border] for image in (sr, hr)]
    for channel in ("y", "rgb"):
        a, b = (luma(image)[..., None] if channel == "y" else image.astype(float) for image in inside)
        assert values[f"psnr_{channel}"] == pytest.approx(
            peak_signal_noise_ratio(b, a, data_range=255), abs=1e-10
        )
        reference = structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        assert values[f"ssim_{channel}"] == pytest.approx(reference, abs=1e-12)
        assert values[f"psnr_{channel}"] == psnr(sr, hr, border, channel)
        assert values[f"ssim_{channel}"] == ssim(sr, hr, border, channel)


def test_equal_images_have_infinite_psnr_their_own_detail_and_no_drift() -> None:
    _, hr = pair(64, 64)
    values = measured(MetricSet(METRICS.keys() - {"lpips", "dists", "feature_distance"}), hr, hr)
    assert values["psnr_y"] == values["psnr_rgb"] == values["lr_psnr"] == math.inf
    assert values["detail_ratio"] == 1.0
    assert values["ssim_y"] == pytest.approx(1, abs=1e-12)
    assert values["color_drift"] == values["color_drift_g"] == 0.0


def test_a_batch_gives_the_values_of_its_images() -> None:
    pairs = [pair(48, 40, seed) for seed in range(3)]
    metrics = MetricSet([*FIDELITY, *CONSISTENCY_AND_DETAIL, "color_drift"])
    sr, hr = (np.stack(images) for images in zip(*pairs, strict=True))
    lr = np.stack([low(image) for image in hr])
    assert metrics.measure(sr, hr, lr) == [measured(metrics, *each) for each in pairs]
    tensors = [torch.from_numpy(images) for images in (sr, hr, lr)]
    assert metrics.measure(*tensors) == metrics.measure(sr, hr, lr)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    sr, hr = pair(400, 360)
    metrics = MetricSet([*FIDELITY, *CONSISTENCY_AND_DETAIL, "color_drift"])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(measured(metrics, sr, hr))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_lr_psnr_compares_the_reduced_image_with_the_input() -> None:
    sr, hr = pair(48, 40)
    values = measured(MetricSet(["lr_psnr"]), sr, hr)
    assert values["lr_psnr"] == pytest.approx(psnr(low(sr), low(hr), 0, "rgb"), abs=1e-10)
    flat = np.full((48, 48, 3), 100, np.uint8)
    values = measured(MetricSet(["lr_psnr"]), flat + np.uint8(5), flat)
    assert values == {"lr_psnr": pytest.approx(20 * math.log10(255 / 5))}


def test_lr_psnr_finds_what_the_input_does_not_show_and_not_what_it_cannot_show() -> None:
    flat = np.full((64, 64, 3), 100, np.uint8)
    fine, coarse = flat.copy(), flat.copy()
    fine[:, ::2], fine[:, 1::2] = 90, 110  # 1/2 cycle a pixel: gone at a quarter of the size
    coarse[:, :32] += 20
    assert measured(MetricSet(["lr_psnr"]), fine, flat)["lr_psnr"] > 45
    assert measured(MetricSet(["lr_psnr"]), coarse, flat)["lr_psnr"] < 26


def waves(period_px: float, amplitude: float) -> Image:
    levels = 128 + amplitude * np.sin(2 * np.pi * np.arange(256) / period_px)
    return np.broadcast_to(np.rint(levels)[:, None], (256, 256))[..., None].repeat(3, 2).astype(np.uint8)


def test_the_detail_ratio_is_an_energy_so_half_the_amplitude_is_a_quarter() -> None:
    metrics = MetricSet(["detail_ratio"])
    assert measured(metrics, waves(4, 40), waves(4, 80))["detail_ratio"] == pytest.approx(1 / 4, rel=0.02)
    assert measured(metrics, waves(4, 80), waves(4, 40))["detail_ratio"] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("period_px", [4, 8, 16])
def test_detail_is_what_ssims_gaussian_removes(period_px: int) -> None:
    def removed(period: float) -> float:
        return 1 - math.exp(-2 * (math.pi * 1.5 / period) ** 2)

    assert removed(8) == pytest.approx(0.5, abs=0.001)
    values = measured(MetricSet(["detail_ratio"]), waves(period_px, 80), waves(3, 80))
    assert values["detail_ratio"] == pytest.approx((removed(period_px) / removed(3)) ** 2, rel=0.05)


def test_a_blurred_image_has_little_detail_and_a_noisy_one_too_much() -> None:
    sr, hr = pair(96, 80)
    smooth = bicubic_upscale(low(hr))
    metrics = MetricSet(["detail_ratio"])
    assert measured(metrics, smooth, hr)["detail_ratio"] < 0.05
    assert measured(metrics, sr, smooth)["detail_ratio"] > 20


def test_two_flat_images_have_the_same_detail() -> None:
    flat = np.full((32, 32, 3), 90, np.uint8)
    assert measured(MetricSet(["detail_ratio"]), flat, flat + np.uint8(4))["detail_ratio"] == pytest.approx(1)


def test_color_drift_is_the_change_of_each_channel_in_levels() -> None:
    flat = np.full((48, 48, 3), 100, np.uint8)
    tinted = flat + np.array([3, 0, 6], np.uint8)
    values = measured(MetricSet(["color_drift"]), tinted, flat)
    assert values == {"color_drift": 3.0, "color_drift_r": 3.0, "color_drift_g": 0.0, "color_drift_b": 6.0}


def test_color_drift_ignores_detail_and_blur() -> None:
    _, hr = pair(96, 80)
    values = measured(MetricSet(["color_drift", "psnr_y"]), bicubic_upscale(low(hr)), hr)
    assert values["psnr_y"] < 20
    assert values["color_drift"] < 0.5


def test_color_drift_finds_opposite_changes_in_two_halves() -> None:
    flat = np.full((128, 128, 3), 100, np.uint8)
    halves = flat.copy()
    halves[:64] += 8
    halves[64:] -= 8
    values = measured(MetricSet(["color_drift"]), halves, flat)
    assert values["color_drift"] == pytest.approx(8, abs=0.2)


@pytest.mark.parametrize(("height", "width"), [(36, 36), (64, 132), (200, 72)])
def test_color_drift_compares_the_means_of_blocks(height: int, width: int) -> None:
    sr, hr = pair(height, width)
    difference = low(sr).astype(float) - low(hr)
    blocks = [
        np.abs(difference[y : y + 16, x : x + 16].mean((0, 1)))
        for y in range(0, height // 4, 16)
        for x in range(0, width // 4, 16)
    ]
    values = measured(MetricSet(["color_drift"]), sr, hr)
    assert list(values.values())[1:] == pytest.approx(np.mean(blocks, 0), abs=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3), (30, 41)])
def test_batches_are_downscaled_as_single_images_are(scale: int, height: int, width: int) -> None:
    draws = np.random.default_rng(7)
    images = draws.integers(0, 256, (2, height * scale, width * scale, 3), dtype=np.uint8)
    images[1] = 255 * (images[1] > 127)
    expected = np.stack([matlab_bicubic_downscale(image, scale) for image in images])
    assert np.array_equal(downscale_batch(torch.from_numpy(images), scale).numpy(), expected)


def test_sizes_that_are_too_small_are_refused_with_the_least_size() -> None:
    sr, hr = pair(16, 32)
    with pytest.raises(UserError, match=r"32 x 16 pixels are too few for ssim_y .* border of 4 .at least 19"):
        measured(MetricSet(FIDELITY), sr, hr)
    assert measured(MetricSet(["psnr_y"]), sr, hr)["psnr_y"] > 0


def test_images_that_do_not_fit_are_refused() -> None:
    sr, hr = pair(32, 32)
    metrics = MetricSet(["psnr_y"])
    with pytest.raises(ValueError, match="do not fit"):
        metrics.measure(sr[None], hr[None, :28], low(hr)[None])
    with pytest.raises(ValueError, match="expected uint8"):
        metrics.measure(sr[None] / 255.0, hr[None], low(hr)[None])
    with pytest.raises(ValueError, match="expected uint8"):
        metrics.measure(sr, hr, low(hr))
