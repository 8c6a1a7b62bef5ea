"""PSNR and SSIM, against the reference numbers and an independent SSIM."""

import math

import numpy as np
import pytest
from scipy.ndimage import correlate1d

from pipeline.imaging import luma, psnr, ssim
from pipeline.imaging.metrics import Channel

Reference = dict[str, np.ndarray]
CHANNELS: list[Channel] = ["y", "rgb"]


@pytest.mark.parametrize("channel", CHANNELS)
def test_metrics_equal_the_reference(reference: Reference, channel: Channel) -> None:
    pair = reference["photo_up"], reference["photo_hr"]
    assert psnr(*pair, border=4, channel=channel) == pytest.approx(
        reference[f"psnr_{channel}_border4"], abs=1e-6
    )
    assert ssim(*pair, border=4, channel=channel) == pytest.approx(
        reference[f"ssim_{channel}_border4"], abs=1e-5
    )


@pytest.mark.parametrize("channel", CHANNELS)
def test_ssim_is_the_mean_over_whole_windows(reference: Reference, channel: Channel) -> None:
    """An independent implementation: only windows inside the image count."""
    pair = [reference[name][:40, :50] for name in ("photo_up", "photo_hr")]
    a, b = (luma(x)[..., None] if channel == "y" else x.astype(float) for x in pair)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = correlate1d(x, window, axis=axis)
        return x[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = mean(a * b) - mean(a) * mean(b)
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    expected = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    expected /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (variances + c2)
    assert ssim(*pair, border=0, channel=channel) == pytest.approx(expected.mean(), abs=1e-9)


def test_equal_images_have_infinite_psnr(reference: Reference) -> None:
    photo = reference["photo_hr"]
    assert psnr(photo, photo) == math.inf
    assert ssim(photo, photo) == pytest.approx(1, abs=1e-12)


def test_border_is_excluded(reference: Reference) -> None:
    photo = reference["photo_hr"]
    framed = photo.copy()
    framed[:4] = framed[-4:] = framed[:, :4] = framed[:, -4:] = 0
    assert psnr(framed, photo, border=4) == math.inf
    assert psnr(framed, photo, border=3) < 40
    assert psnr(framed, photo, border=0, channel="rgb") < psnr(framed, photo, border=3, channel="rgb")


def test_luma_runs_from_16_to_235() -> None:
    image = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(image)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-9)


def test_invalid_input_raises_a_clear_error() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    for sr, hr, options, message in [
        (image, image[:8], {}, "two RGB images of the same size"),
        (image[..., :1], image[..., :1], {}, "two RGB images"),
        (image.astype(float), image, {}, "sr: expected uint8"),
        (image, image, {"channel": "lab"}, "channel='lab'"),
        (image, image, {"border": 8}, "border=8: at least 1 px"),
        (image, image, {"border": -1}, "border=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            psnr(sr, hr, **options)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(image, image, border=3)
