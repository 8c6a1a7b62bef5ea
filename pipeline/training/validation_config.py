"""Configuration of the validation within a run."""

from typing import Literal

from pydantic import Field

from pipeline.metrics.names import FIDELITY
from pipeline.section import Section

MetricName = Literal["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "color_drift"]


class ValidationConfig(Section):
    """What is measured on the held-out images."""

    metrics: tuple[MetricName, ...] = Field(
        FIDELITY,  # type: ignore[arg-type]
        min_length=1,
        description="Metrics of every validation: PSNR and SSIM on luma or RGB; LPIPS (AlexNet); color_drift, the mean "
        "difference in 8-bit levels between the downscaled SR image and the LR image.",
    )
    weights_folder: str | None = Field(
        None,
        description="Folder with the backbone weights of lpips. Default: torch hub's cache.",
    )
