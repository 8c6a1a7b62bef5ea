"""Measures super-resolved images with a choice of metrics, in batches on a device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.imaging import downscale_batch
from pipeline.imaging.metrics import SSIM_WINDOW_PX, batch_psnr, batch_ssim, detail_ratio, planes
from pipeline.metrics.distances import load_distance
from pipeline.metrics.names import METRICS
from pipeline.model.device import ieee_float32

Images = NDArray[np.uint8] | Tensor
COLORS = ("r", "g", "b")
_COLOR_PX = 16


class MetricSet:
    """A choice of metrics, with their networks.

    Args:
        names: keys of `METRICS`.
        device: where they are computed.
        border: pixels excluded at each edge, except for lr_psnr and color_drift; papers exclude `scale` pixels.
        folder: contains the weights files of the perceptual metrics; default: see `weights_file`.

    Raises:
        UserError: a weights file is missing, corrupt, or another network's.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        border: int = 4,
        folder: str | None = None,
    ) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.border = border
        self._distances = {
            name: load_distance(name, folder) for name in self.names if METRICS[name].perceptual
        }
        self.to(device)

    def to(self, device: torch.device | str) -> "MetricSet":
        """Moves the networks; returns itself."""
        self.device = torch.device(device)
        for distance in self._distances.values():
            distance.to(self.device)
        return self

    def require_size(self, height: int, width: int) -> None:
        """Raises UserError for an image that is too small for one of the metrics."""
        for name in self.names:
            least = 2 * self.border + self._least_px(name)
            if min(height, width) < least:
                raise UserError(
                    f"{width} x {height} pixels are too few for {name} with a border of {self.border} "
                    f"(at least {least})"
                )

    def _least_px(self, name: str) -> int:
        if name in self._distances:
            return self._distances[name].least_px
        return SSIM_WINDOW_PX if name.startswith("ssim") or name == "detail_ratio" else 1

    @torch.inference_mode()
    @ieee_float32()
    def measure(self, sr: Images, hr: Images, lr: Images) -> list[dict[str, float]]:
        """The metrics of each image of a batch; networks compute in IEEE float32, whatever the run's precision is.

        Args:
            sr: uint8 RGB (N, H, W, 3).
            hr: ground truth, of the same shape.
            lr: uint8 RGB (N, H / scale, W / scale, 3).

        Returns:
            For each image its metrics by name. PSNR of equal images is infinite. color_drift is followed by that of
            each channel: color_drift_r, color_drift_g and color_drift_b.

        Raises:
            ValueError: dtype or shape is not supported.
            UserError: the images are too small for one of the metrics.
        """
        sr, hr, lr = (self._on_device(images) for images in (sr, hr, lr))
        if sr.shape != hr.shape or sr.shape[1] % lr.shape[1] or sr.shape[2] % lr.shape[2]:
            raise ValueError(
                f"sr {tuple(sr.shape)}, hr {tuple(hr.shape)} and lr {tuple(lr.shape)} do not fit"
            )
        self.require_size(*sr.shape[1:3])
        border = self.border
        inside = [
            images[:, border : images.shape[1] - border, border : images.shape[2] - border]
            for images in (sr, hr)
        ]
        values: dict[str, Tensor] = {}
        for channel, metrics in (
            ("y", {"psnr_y": batch_psnr, "ssim_y": batch_ssim, "detail_ratio": detail_ratio}),
            ("rgb", {"psnr_rgb": batch_psnr, "ssim_rgb": batch_ssim}),
        ):
            if metrics.keys() & set(self.names):
                pair = [planes(images, channel) for images in inside]
                values |= {name: metric(*pair) for name, metric in metrics.items() if name in self.names}
        for name, distance in self._distances.items():
            levels = (images.permute(0, 3, 1, 2).float().div_(255) for images in inside)
            values[name] = distance(*levels).double()
        if {"lr_psnr", "color_drift"} & set(self.names):
            downscaled = downscale_batch(sr, sr.shape[1] // lr.shape[1])
            small = [planes(images, "rgb") for images in (downscaled, lr)]
            values["lr_psnr"] = batch_psnr(*small)
            drift = color_drift(*small)
            values["color_drift"] = drift.mean(1)
            values |= {f"color_drift_{color}": drift[:, index] for index, color in enumerate(COLORS)}
        table = torch.stack([values[name] for name in self.columns], dim=1).tolist()
        return [dict(zip(self.columns, row, strict=True)) for row in table]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in a result of `measure`, in their order."""
        drifts = [f"color_drift_{color}" for color in COLORS] if "color_drift" in self.names else []
        return (*self.names, *drifts)

    def _on_device(self, images: Images) -> Tensor:
        if isinstance(images, np.ndarray):
            # A copy: torch requires writable memory.
            images = torch.from_numpy(images.copy())
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"expected uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        return images.to(self.device)


def color_drift(downscaled: Tensor, lr: Tensor) -> Tensor:
    """Mean absolute difference, in 8-bit levels, of the downscaled SR images' colors from those of the LR images.

    Colors are means of 16 x 16 LR pixels: single pixels also differ where an SR image is only blurred (bicubic: by 1 to
    5 levels).

    Args:
        downscaled: float64 (N, 3, H, W) from 0 to 255, by MATLAB's bicubic: an HR image differs by 0 from its LR image.
        lr: of the same shape.

    Returns:
        float64 (N, 3), for each channel.
    """
    colors = functional.avg_pool2d(downscaled - lr, _COLOR_PX, ceil_mode=True, count_include_pad=False)
    return colors.abs().mean((2, 3))
