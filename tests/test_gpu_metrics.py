"""Metrics on a GPU are those of the CPU."""

import numpy as np
import pytest
from gpu import requires_gpu

from pipeline.metrics import METRICS, MetricSet, unavailable
from pipeline.model import set_precision

pytestmark = [pytest.mark.gpu, requires_gpu]


def test_metrics_on_a_gpu_equal_those_on_the_cpu_whatever_the_precision() -> None:
    draws = np.random.default_rng(0)
    hr = draws.integers(0, 256, (3, 400, 360, 3), dtype=np.uint8)
    sr = np.clip(hr + draws.integers(-20, 21, hr.shape), 0, 255).astype(np.uint8)
    lr = draws.integers(0, 256, (3, 100, 90, 3), dtype=np.uint8)
    missing = unavailable(list(METRICS))
    print(f"not measured: {missing}")
    names = [name for name in METRICS if name not in missing]
    expected = MetricSet(names).measure(sr, hr, lr)
    try:
        set_precision("tf32")
        measured = MetricSet(names, "cuda").measure(sr, hr, lr)
    finally:
        set_precision("tf32")  # torch's default
    for values, reference in zip(measured, expected, strict=True):
        for name, value in values.items():
            exact = name.split("_")[0] in ("psnr", "ssim", "color")
            assert value == pytest.approx(reference[name], abs=1e-9 if exact else 1e-5), name
