"""The image metrics: name, label, unit and direction of each. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MetricName = Literal[
    "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "dists", "feature_distance", "color_drift"
]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown and compared."""

    label: str
    """Title in tables and figures."""
    unit: str
    """Empty for a number without a unit."""
    higher_is_better: bool
    decimals: int
    """Digits after the point in tables."""
    perceptual: bool
    """A distance of network features, which follows human judgment more closely than pixel differences do."""

    def shown(self, value: float, sign: str = "") -> str:
        """A value as text, without its unit; with sign="+" also positive values have a sign."""
        if not math.isfinite(value):
            return "∞" if value > 0 else "–"
        return f"{value:{sign}.{self.decimals}f}"


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "psnr_y": Metric("PSNR (Y)", "dB", True, 2, False),
        "ssim_y": Metric("SSIM (Y)", "", True, 4, False),
        "psnr_rgb": Metric("PSNR (RGB)", "dB", True, 2, False),
        "ssim_rgb": Metric("SSIM (RGB)", "", True, 4, False),
        "lpips": Metric("LPIPS", "", False, 4, True),
        "dists": Metric("DISTS", "", False, 4, True),
        "feature_distance": Metric("feature distance", "", False, 4, True),
        "color_drift": Metric("color drift", "levels", False, 2, False),
    }
)
FIDELITY: tuple[MetricName, ...] = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
"""PSNR and SSIM: they compare pixels and need no weights."""
PERCEPTUAL = tuple(name for name, metric in METRICS.items() if metric.perceptual)
"""The best known first: the order in which a default is chosen."""


def metric_of(key: str) -> str:
    """The metric in the name of a validation's result: `lpips` of `Set14/lpips`."""
    return key.rpartition("/")[2]


def better(name: str, a: float, b: float) -> bool:
    """Whether the value `a` of the metric `name` is strictly better than `b`; NaN is worse than any number.

    Raises:
        KeyError: an unknown name.
    """
    higher = METRICS[name].higher_is_better
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a)
    return a > b if higher else a < b
