"""The image metrics: name, label, unit and direction of each. Imports nothing heavy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MetricName = Literal[
    "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lr_psnr", "lpips", "dists", "feature_distance", "color_drift"
]
"""Those that validation may measure and that may choose a model: all but detail_ratio, which only describes it."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown and compared."""

    label: str
    """Title in tables and figures."""
    unit: str
    """Empty for a number without a unit."""
    best: float
    """The value of a result that equals the original: infinity, 0 or 1; values closer to it are better."""
    decimals: int
    """Digits after the point in tables."""
    definition: str
    """For the notes below a table."""
    perceptual: bool = False
    """A distance of network features, which follows human judgment more closely than pixel differences do."""

    @property
    def higher_is_better(self) -> bool:
        """Whether every higher value is better."""
        return self.best == math.inf

    @property
    def title(self) -> str:
        """Label, unit and the direction in which it is better, such as `PSNR (Y), dB ↑` or `detail ratio → 1`."""
        direction = {math.inf: "↑", 0.0: "↓"}.get(self.best, f"→ {self.best:g}")
        return f"{self.label}{f', {self.unit}' if self.unit else ''} {direction}"

    def cost(self, value: float) -> float:
        """A value as a number that is better when it is smaller; NaN is infinity."""
        distance = -value if self.higher_is_better else abs(value - self.best)
        return math.inf if math.isnan(distance) else distance

    def best_of(self, values: Sequence[float]) -> float:
        """The best of the values; NaN only if all are."""
        return min(values, key=self.cost)

    def shown(self, value: float, sign: str = "") -> str:
        """A value as text, without its unit; with sign="+" also positive values have a sign."""
        if not math.isfinite(value):
            return "∞" if value > 0 else "–"
        return f"{value:{sign}.{self.decimals}f}"


_PSNR = "peak signal-to-noise ratio of 8-bit images"
_SSIM = "structural similarity, Gaussian window of 11 px"
_Y, _RGB = "on BT.601 luma (16 to 235)", "on red, green and blue"
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "psnr_y": Metric("PSNR (Y)", "dB", math.inf, 2, f"{_PSNR} {_Y}"),
        "ssim_y": Metric("SSIM (Y)", "", math.inf, 4, f"{_SSIM}, {_Y}"),
        "psnr_rgb": Metric("PSNR (RGB)", "dB", math.inf, 2, f"{_PSNR} {_RGB}"),
        "ssim_rgb": Metric("SSIM (RGB)", "", math.inf, 4, f"{_SSIM}, {_RGB}"),
        "lr_psnr": Metric(
            "LR-PSNR", "dB", math.inf, 2, "PSNR (RGB) of the result, reduced by MATLAB's bicubic, and the input: "
            "consistency with the input"
        ),
        "detail_ratio": Metric(
            "detail ratio", "", 1.0, 2, "energy of the result's fine detail (luma minus its Gaussian blur of 1.5 px) "
            "as a share of the original's; below 1 smoother, above 1 noisier or sharper"
        ),
        "lpips": Metric("LPIPS", "", 0.0, 4, "with AlexNet, version 0.1", perceptual=True),
        "dists": Metric("DISTS", "", 0.0, 4, "with VGG16", perceptual=True),
        "feature_distance": Metric(
            "feature distance", "", 0.0, 4, "of EfficientNet-Lite0's features", perceptual=True
        ),
        "color_drift": Metric(
            "color drift", "levels", 0.0, 2, "mean difference of the reduced result's colors from the input's, "
            "in 8-bit levels"
        ),
    }
)  # fmt: skip
FIDELITY: tuple[MetricName, ...] = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
"""PSNR and SSIM: they compare pixels and need no weights."""
CONSISTENCY_AND_DETAIL = ("lr_psnr", "detail_ratio")
"""They need no weights either; an evaluation shows them in addition: PSNR and SSIM alone prefer smooth images."""
PERCEPTUAL = tuple(name for name, metric in METRICS.items() if metric.perceptual)
"""The best known first: the order in which a default is chosen."""


def metric_of(key: str) -> str:
    """The metric in the name of a validation's result: `lpips` of `Set14/lpips`."""
    return key.rpartition("/")[2]


def label_of(key: str) -> str:
    """The label of a validation's result: `LPIPS on Set14`. Raises KeyError: an unknown metric."""
    name = key.rpartition("/")[0]
    return f"{METRICS[metric_of(key)].label}{f' on {name}' if name else ''}"


def axis_label(key: str) -> str:
    """`label_of` with the unit and, on a second line, the direction in which it is better."""
    metric = METRICS[metric_of(key)]
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{label_of(key)}{unit}\n({'higher' if metric.higher_is_better else 'lower'} is better)"


def better(name: str, a: float, b: float) -> bool:
    """Whether the value `a` of the metric `name` is strictly better than `b`; NaN is worse than any number.

    Raises:
        KeyError: an unknown name.
    """
    cost = METRICS[name].cost
    return cost(a) < cost(b)
