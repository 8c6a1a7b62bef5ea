"""Functions on 8-bit images: bicubic degradation, metrics (`ssim` needs scikit-image), tiled inference."""

from pipeline.imaging.arrays import DeepImage, Image, to_tensor, to_uint8
from pipeline.imaging.bicubic import (
    Edge,
    bicubic_upscale,
    float_bicubic_downscale,
    matlab_bicubic_downscale,
)
from pipeline.imaging.bicubic_batch import downscale_batch
from pipeline.imaging.metrics import Channel, luma, psnr, ssim
from pipeline.imaging.tiling import prepared, upscale

__all__ = [
    "Channel",
    "DeepImage",
    "Edge",
    "Image",
    "bicubic_upscale",
    "downscale_batch",
    "float_bicubic_downscale",
    "luma",
    "matlab_bicubic_downscale",
    "prepared",
    "psnr",
    "ssim",
    "to_tensor",
    "to_uint8",
    "upscale",
]
