"""The report: one HTML page that needs no network."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pipeline.evaluation.layout import Refused
from pipeline.evaluation.scoring import Settings

MAX_PICTURES_BYTES = 12_000_000
TITLES = {
    "psnr_y": "PSNR (Y)", "ssim_y": "SSIM (Y)", "psnr_rgb": "PSNR (RGB)", "ssim_rgb": "SSIM (RGB)", "lpips": "LPIPS",
}  # fmt: skip
# Small, so that its letters can still be read on a phone.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 300, 58, 48


def render_report(
    labels: Sequence[str],
    names: Sequence[str],
    metrics: Sequence[str],
    images: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, float]],
    refused: Sequence[Refused],
    settings: Settings,
) -> str:
    """The page's text.

    Args:
        labels: short names of the models.
        names: their full names.
        metrics: names of the metrics, in columns' order.
        images: outcomes of `Scorer`; as many as fit into 12 MB are shown, those first in which the models differ most.
        means: of each model.
        refused: named at the end.
        settings: scale and border, for the head.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["metric"] = _shown
    pictured = _that_fit(images, settings)
    data = {
        "labels": list(labels),
        "metrics": [{"key": key, "title": TITLES.get(key, key), "lower": key == "lpips"} for key in metrics],
        "images": [
            {"name": image["name"], "anchor": pictured.get(index), "values": [
                {key: _json_number(row[key]) for key in metrics} for row in image["metrics"]
            ]}
            for index, image in enumerate(images)
        ],
    }  # fmt: skip
    return environment.get_template("report.html.j2").render(
        labels=labels,
        names=names,
        metrics=metrics,
        titles=TITLES,
        means=means,
        best={key: (min if key == "lpips" else max)(mean[key] for mean in means) for key in metrics},
        cards=[(anchor, images[index]) for index, anchor in pictured.items()],
        count=len(images),
        refused=refused,
        settings=settings,
        with_bicubic="bicubic" not in names,
        scatter=_scatter(means) if "lpips" in metrics else None,
        # Inside a script element nothing may close it.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )


def _that_fit(images: Sequence[Mapping[str, Any]], settings: Settings) -> dict[int, str]:
    """Index and anchor of the pictures that are shown, in the order of names."""

    def spread_of(index: int) -> float:
        values = [row["psnr_y"] for row in images[index]["metrics"] if math.isfinite(row["psnr_y"])]
        return max(values, default=0.0) - min(values, default=0.0)

    left, chosen = MAX_PICTURES_BYTES, []
    # Those whose crop was chosen by hand come first, then the largest differences.
    for index in sorted(
        range(len(images)), key=lambda i: (images[i]["name"] not in settings.boxes, -spread_of(i))
    ):
        pictures = images[index]["pictures"]
        size = sum(len(pictures[key]) for key in ("lr", "bicubic", "hr", "overview")) + sum(
            map(len, pictures["models"])
        )
        if size <= left:
            left -= size
            chosen.append(index)
    return {index: f"image-{index}" for index in sorted(chosen)}


def _scatter(means: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Coordinates of the perception-distortion picture: PSNR to the right, LPIPS upwards; points are numbered."""
    xs, ys = [mean["psnr_y"] for mean in means], [mean["lpips"] for mean in means]

    def axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        step = 10 ** math.floor(math.log10(max(high - low, 1e-3)))
        step = step / 2 if (high - low) / step < 3 else step * 2 if (high - low) / step > 6 else step
        low, high = math.floor(low / step - 0.5) * step, math.ceil(high / step + 0.5) * step
        return low, high, [low + step * number for number in range(round((high - low) / step) + 1)]

    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = axis(xs), axis(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - 16)
        return across, (_HEIGHT - _BOTTOM) - (y - y_low) / (y_high - y_low) * (_HEIGHT - _BOTTOM - 16)

    dots = {
        number: place(x, y) for number, (x, y) in enumerate(zip(xs, ys, strict=True), 1) if math.isfinite(x)
    }
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "bottom": _HEIGHT - _BOTTOM,
        "dots": dots, "numbers": _beside(dots),
        "x_ticks": [(place(x, y_low)[0], f"{x:.4g}") for x in x_ticks],
        "y_ticks": [(place(x_low, y)[1], f"{y:.3g}") for y in y_ticks],
    }  # fmt: skip


def _beside(dots: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """A free place near each dot for its number."""
    near = [
        (12, -8),
        (-12, -8),
        (12, 12),
        (-12, 12),
        (0, -14),
        (0, 18),
        (24, 2),
        (-24, 2),
        (24, -16),
        (-24, 18),
    ]
    taken, places = list(dots.values()), {}
    for number, (x, y) in dots.items():
        candidates = [(x + right, y + down) for right, down in near]
        places[number] = max(
            candidates, key=lambda spot: min(10.0, min(math.dist(spot, other) for other in taken))
        )
        taken.append(places[number])
    return places


def _shown(value: float, key: str) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.2f}" if key.startswith("psnr") else f"{value:.4f}"


def _json_number(value: float) -> float | str | None:
    return value if math.isfinite(value) else "inf" if value > 0 else None
