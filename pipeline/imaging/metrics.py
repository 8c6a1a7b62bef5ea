"""PSNR and SSIM as super-resolution papers compute them."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.imaging.arrays import Image, require_image

Channel = Literal["y", "rgb"]
SSIM_WINDOW_PX = 11


def psnr(sr: Image, hr: Image, border: int = 4, channel: Channel = "y") -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        sr: uint8 (H, W, 3).
        hr: ground truth, of the same shape.
        border: pixels excluded at each edge; papers exclude `scale` pixels.
        channel: "y": BT.601 luma (16 to 235, not rounded); "rgb": over all three channels.

    Raises:
        ValueError: shapes differ, dtype or channel is not supported, or the border covers the image.
    """
    a, b = _prepared(sr, hr, border, channel, least_px=1)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(sr: Image, hr: Image, border: int = 4, channel: Channel = "y") -> float:
    """Structural similarity (Wang et al. 2004), at most 1: Gaussian window of 11 px, sigma 1.5, no padding.

    Arguments and errors as for `psnr`; "rgb" is the mean over the three channels.
    """
    # Imports SciPy, which takes half a second; ingest workers need only the degradation.
    from skimage.metrics import structural_similarity

    a, b = _prepared(sr, hr, border, channel, least_px=SSIM_WINDOW_PX)
    return float(
        structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
    )


def luma(image: Image) -> NDArray[np.float64]:
    """BT.601 luma of uint8 RGB (H, W, 3), 16 to 235, not rounded, as MATLAB's rgb2ycbcr before its rounding."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def _prepared(
    sr: Image, hr: Image, border: int, channel: str, least_px: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 (H, W, channels) without the border."""
    require_image(sr, "sr")
    require_image(hr, "hr")
    if sr.shape != hr.shape or sr.shape[2] != 3:
        raise ValueError(f"sr {sr.shape} and hr {hr.shape}: expected two RGB images of the same size")
    if channel not in ("y", "rgb"):
        raise ValueError(f"channel={channel!r}: use 'y' or 'rgb'")
    if border < 0 or min(sr.shape[:2]) < 2 * border + least_px:
        raise ValueError(
            f"{sr.shape[0]} x {sr.shape[1]} pixels with border={border}: at least {least_px} px must remain"
        )
    inside = slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border)

    def chosen(image: Image) -> NDArray[Any]:
        return luma(image[inside])[..., None] if channel == "y" else image[inside].astype(np.float64)

    return chosen(sr), chosen(hr)
