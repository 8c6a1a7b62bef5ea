"""Metrics on a GPU are those of the CPU."""

import numpy as np
import pytest
import torch
from gpu import requires_gpu

from pipeline.data import HeldOutPhoto
from pipeline.imaging import matlab_bicubic_downscale
from pipeline.metrics import METRICS, MetricSet, unavailable
from pipeline.model import RRDBNet, seeded, set_precision
from pipeline.model.trunk import use_kernels
from pipeline.training.validation import validate
from pipeline.training.validation_sets import ValidationSet

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


@pytest.mark.parametrize("size", [1.0, 1e6])  # of the weights; the larger overflow float16
def test_validation_in_half_precision_agrees_with_float32(size: float) -> None:
    draws = np.random.default_rng(1)
    image = draws.integers(0, 256, (192, 256, 3), dtype=np.uint8)
    sets = [ValidationSet("held_out", [HeldOutPhoto("a.png", image, matlab_bicubic_downscale(image))])]
    network = seeded(0, lambda: RRDBNet(32, 2, 16)).to("cuda", memory_format=torch.channels_last).eval()
    with torch.no_grad():
        network.conv_first.weight.mul_(size)
        network.conv_last.weight.div_(size)
    use_kernels(network)
    metrics = MetricSet(["psnr_y", "ssim_y"], torch.device("cuda"))
    try:
        set_precision("fp32")
        expected = validate(network, sets, metrics)
        set_precision("bf16")
        found = validate(network, sets, metrics, half=True)
    finally:
        set_precision("tf32")  # torch's default
    assert found == pytest.approx(expected, abs=1e-2)
