"""The table of metrics: what is better, how values are shown, and that it cannot be changed."""

import math
from typing import get_args

import pytest

from pipeline.metrics.names import FIDELITY, METRICS, PERCEPTUAL, MetricName, better

FIDELITY_NAMES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
HIGHER = (*FIDELITY_NAMES, "lr_psnr")


def test_the_table_has_all_metrics_in_their_order() -> None:
    assert tuple(METRICS) == (*HIGHER, "detail_ratio", "lpips", "dists", "feature_distance", "color_drift")
    assert FIDELITY == FIDELITY_NAMES
    assert PERCEPTUAL == ("lpips", "dists", "feature_distance")


def test_a_metric_that_only_describes_cannot_choose_a_model() -> None:
    assert get_args(MetricName) == tuple(name for name in METRICS if name != "detail_ratio")


@pytest.mark.parametrize("name", METRICS)
def test_better_follows_the_direction_of_the_metric(name: str) -> None:
    high, low = (2.0, 1.0) if name in HIGHER else (1.0, 2.0)
    assert better(name, high, low)
    assert not better(name, low, high)
    assert not better(name, low, low)
    assert better(name, low, math.nan)
    assert not better(name, math.nan, low)
    assert not better(name, math.nan, math.nan)


def test_a_detail_ratio_is_better_the_closer_it_is_to_1() -> None:
    assert better("detail_ratio", 0.9, 1.2)
    assert better("detail_ratio", 1.2, 0.5)
    assert not better("detail_ratio", 1.25, 0.75)
    assert METRICS["detail_ratio"].best_of([0.2, 1.1, 3.0, math.nan]) == 1.1
    assert METRICS["psnr_y"].best_of([math.nan, 20.0, math.inf]) == math.inf
    assert METRICS["lpips"].best_of([0.2, 0.1]) == 0.1


def test_titles_state_unit_and_direction() -> None:
    assert METRICS["lr_psnr"].title == "LR-PSNR, dB ↑"
    assert METRICS["detail_ratio"].title == "detail ratio → 1"
    assert METRICS["lpips"].title == "LPIPS ↓"


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
