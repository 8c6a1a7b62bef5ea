"""Image metrics on the device: PSNR and SSIM, perceptual distances, color drift. Requires torch, not Ray or MLflow."""

from pipeline.metrics.metric_set import MetricSet
from pipeline.metrics.names import FIDELITY, METRICS, PERCEPTUAL, better, metric_of
from pipeline.metrics.weights import require, unavailable

__all__ = [
    "FIDELITY",
    "METRICS",
    "PERCEPTUAL",
    "MetricSet",
    "better",
    "metric_of",
    "require",
    "unavailable",
]
