"""Functions on 8-bit images: bicubic degradation, metrics, tiled inference."""

from pipeline.imaging.arrays import DeepImage, Image
from pipeline.imaging.bicubic import (
    bicubic_upscale,
    downscale_batch,
    float_bicubic_downscale,
    matlab_bicubic_downscale,
)
from pipeline.imaging.metrics import luma, psnr, ssim
from pipeline.imaging.tiling import prepared, upscale
