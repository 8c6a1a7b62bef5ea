"""Image metrics on the device: PSNR and SSIM, perceptual distances, color drift. Requires torch, not Ray or MLflow."""

from pipeline.metrics.names import FIDELITY, METRICS, PERCEPTUAL, Metric, better

__all__ = ["FIDELITY", "METRICS", "PERCEPTUAL", "Metric", "better"]
