"""The perception-distortion figure of a run (Blau and Michaeli 2018): PSNR against a perceptual metric."""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.errors import is_installed
from pipeline.imaging import Image
from pipeline.metrics import PERCEPTUAL, metric_of
from pipeline.metrics.names import axis_label
from pipeline.training.config import TrainConfig
from pipeline.training.selection import measured_metrics, metric_key, select_key
from pipeline.training.validation_config import HELD_OUT

KEY = "perception_distortion"
_DPI = 110


def axes_of(config: TrainConfig) -> tuple[str, str] | None:
    """The names, among a validation's metrics, of the two axes: PSNR, and the metric that chooses in stage 2.

    None without stage 2, without PSNR, without a perceptual metric, or without matplotlib.
    """
    measured, chosen = measured_metrics(config), metric_of(select_key(config, "gan"))
    psnr = [name for name in ("psnr_y", "psnr_rgb") if name in measured]
    perceptual = [name for name in (chosen, *PERCEPTUAL) if name in PERCEPTUAL and name in measured]
    if not (config.gan.steps and psnr and perceptual and is_installed("matplotlib")):
        return None
    name = config.validation.select_on or HELD_OUT
    return metric_key(name, psnr[0]), metric_key(name, perceptual[0])


def perception_distortion_figure(
    validations: Mapping[int, Mapping[str, float]],
    axes: tuple[str, str],
    stage_one: int,
    best: int | None,
    bicubic: Mapping[str, float],
) -> Image:
    """The figure as an image, uint8 (H, W, 3).

    Args:
        validations: metrics by step.
        axes: the metrics of the horizontal and the vertical axis.
        stage_one: the last step of stage 1, whose result is marked; 0: there was no stage 1.
        best: step of the best checkpoint of stage 2, which is marked.
        bicubic: metrics of bicubic upscaling.
    """
    # Imported here, because it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = {
        step: (metrics[axes[0]], metrics[axes[1]])
        for step, metrics in sorted(validations.items())
        if axes[0] in metrics and axes[1] in metrics
    }
    one = [point for step, point in points.items() if 0 < step <= stage_one]
    two = {step: point for step, point in points.items() if step > stage_one}
    figure = Figure(figsize=(6.4, 4.8), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot(*_columns(one), "-", color="#8fa6b8", linewidth=0.8)
    panel.scatter(*_columns(one), s=18, color="#8fa6b8", label="stage 1")
    joined = [points[stage_one], *two.values()] if stage_one in points else list(two.values())
    panel.plot(*_columns(joined), "-", color="#30638e", linewidth=0.8)
    shown = panel.scatter(
        *_columns(list(two.values())), c=list(two), s=26, cmap="viridis", label="stage 2", zorder=3
    )
    if len(two) > 1:
        figure.colorbar(shown, label="step")
    for label, marker, color, point in (
        ("stage 1's result", "D", "#edae49", points.get(stage_one) if stage_one else None),
        ("best of stage 2", "*", "#d1495b", points.get(best) if best else None),
        ("bicubic", "s", "#666666", (bicubic[axes[0]], bicubic[axes[1]]) if axes[1] in bicubic else None),
    ):
        if point is not None:
            size = 190 if marker == "*" else 60
            panel.scatter(
                *point, s=size, marker=marker, color=color, edgecolors="black", label=label, zorder=4
            )
    panel.set_xlabel(axis_label(axes[0]))
    panel.set_ylabel(axis_label(axes[1]))
    panel.set_title(f"last validation: step {max(points)}" if points else "", fontsize=10)
    panel.grid(visible=True, color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
