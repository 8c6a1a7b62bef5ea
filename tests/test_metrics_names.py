"""The table of metrics: what is better, how values are shown, and that it cannot be changed."""

import math
from typing import get_args

import pytest

from pipeline.metrics.names import FIDELITY, METRICS, PERCEPTUAL, MetricName, better

HIGHER = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


def test_the_table_has_all_metrics_in_their_order() -> None:
    assert tuple(METRICS) == (*HIGHER, "lpips", "dists", "feature_distance", "color_drift")
    assert get_args(MetricName) == tuple(METRICS)
    assert FIDELITY == HIGHER
    assert PERCEPTUAL == ("lpips", "dists", "feature_distance")


@pytest.mark.parametrize("name", METRICS)
def test_better_follows_the_direction_of_the_metric(name: str) -> None:
    high, low = (2.0, 1.0) if name in HIGHER else (1.0, 2.0)
    assert better(name, high, low)
    assert not better(name, low, high)
    assert not better(name, low, low)
    assert better(name, low, math.nan)
    assert not better(name, math.nan, low)
    assert not better(name, math.nan, math.nan)


def test_an_unknown_metric_has_no_direction() -> None:
    with pytest.raises(KeyError, match="niqe"):
        better("niqe", math.nan, 2.0)


def test_the_table_is_immutable() -> None:
    with pytest.raises(TypeError):
        METRICS["niqe"] = METRICS["lpips"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        METRICS["lpips"].decimals = 2  # type: ignore[misc]


def test_values_are_shown_with_the_digits_of_the_metric() -> None:
    assert METRICS["psnr_y"].shown(30.615) in ("30.61", "30.62")
    assert METRICS["lpips"].shown(0.07484) == "0.0748"
    assert METRICS["psnr_y"].shown(math.inf) == METRICS["psnr_y"].shown(math.inf, "+") == "∞"
    assert [METRICS["psnr_y"].shown(value, "+") for value in (0.5, -0.5)] == ["+0.50", "-0.50"]
    assert METRICS["lpips"].shown(math.nan) == "–"
