"""Comparison of a run's validations with bicubic upscaling of the same images."""

from collections.abc import Mapping

# PSNR on the Y channel, as published tables use it.
METRIC = "psnr_y"


def is_below(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> bool:
    """Whether PSNR (Y) is worse than bicubic's on a validation set; False where it is not measured."""
    return any(
        value < bicubic[key]
        for key, value in metrics.items()
        if key.rpartition("/")[2] == METRIC and key in bicubic
    )


def comparison(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> str:
    """The metrics with bicubic's, in one line; those that bicubic was not measured by are omitted."""
    return ", ".join(
        f"{key} {value:.4f} (bicubic {bicubic[key]:.4f})" for key, value in metrics.items() if key in bicubic
    )
