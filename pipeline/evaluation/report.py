"""The report: one HTML page that needs no network."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence

import jinja2
import matplotlib
from matplotlib.figure import Figure

from pipeline.evaluation.result import Evaluation
from pipeline.metrics import METRICS, PERCEPTUAL

MAX_IMAGE_BYTES = 9_000_000  # 12 MB in the page, as base64


def render_report(evaluation: Evaluation) -> str:
    """The page's text. As many images are shown as fit into 12 MB, first those in which the models differ most."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["metric"] = lambda value, key: METRICS[key].shown(value)
    environment.filters["signed"] = lambda value, key: METRICS[key].shown(value, "+")
    environment.filters["data_uri"] = _data_uri
    images, metrics, means = evaluation.images, evaluation.metrics, evaluation.means
    perceptual = next((name for name in PERCEPTUAL if name in metrics), None)
    anchors = {index: f"image-{index}" for index in _shown_images(evaluation)}
    data = {
        "labels": evaluation.labels,
        "metrics": [
            {
                "key": key,
                "title": METRICS[key].label,
                "best": _json_number(METRICS[key].best),
                "digits": METRICS[key].decimals,
            }
            for key in metrics
        ],
        "images": [
            {
                "name": image.name,
                "anchor": anchors.get(index),
                "values": [{key: _json_number(row[key]) for key in metrics} for row in image.metrics],
            }
            for index, image in enumerate(images)
        ],
    }
    return environment.get_template("report.html.j2").render(
        labels=evaluation.labels,
        names=evaluation.names,
        metrics=metrics,
        table=METRICS,
        means=means,
        intervals=evaluation.intervals,
        comparisons=evaluation.comparisons,
        baseline=evaluation.baseline,
        best={
            key: METRICS[key].best_of([mean[key] for _, mean in evaluation.shown_means]) for key in metrics
        },
        cards=[(anchor, images[index]) for index, anchor in anchors.items()],
        count=len(images),
        rejected=evaluation.rejected,
        settings=evaluation.settings,
        with_bicubic="bicubic" not in evaluation.names,
        perceptual=perceptual,
        protocol=evaluation.protocol,
        origins=evaluation.origins,
        tradeoff=_svg(tradeoff_figure(means, perceptual)) if perceptual else None,
        # Nothing may close the script element that holds it.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )


def tradeoff_figure(means: Sequence[Mapping[str, float]], perceptual: str) -> Figure:
    """A perceptual metric over PSNR (perception-distortion): a numbered point for each model."""
    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    for number, mean in enumerate(means, start=1):
        if math.isfinite(mean["psnr_y"]):
            point = (mean["psnr_y"], mean[perceptual])
            axes.scatter(*point, s=45, color="#1f5fbf", alpha=0.85)
            # Consecutive models are often close to each other: their numbers are on different sides.
            offset, side = ((8, 0), "left") if number % 2 else ((-8, 0), "right")
            axes.annotate(str(number), point, xytext=offset, textcoords="offset points", ha=side, va="center")
    axes.margins(0.15)
    axes.grid(color="#dfe3e9")
    axes.set_axisbelow(True)
    axes.set_xlabel("PSNR (Y), dB: lower distortion →")
    axes.set_ylabel(f"← better perceptual quality: {METRICS[perceptual].label}")
    return figure


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "esrgan-ray"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _shown_images(evaluation: Evaluation) -> list[int]:
    """Indices of the images that fit: first those with a crop chosen by the user, then the largest differences."""

    def difference(index: int) -> float:
        values = [row["psnr_y"] for row in evaluation.images[index].metrics if math.isfinite(row["psnr_y"])]
        return max(values, default=0.0) - min(values, default=0.0)

    boxes, free, chosen = evaluation.settings.boxes, MAX_IMAGE_BYTES, []
    order = range(len(evaluation.images))
    for index in sorted(order, key=lambda i: (evaluation.images[i].name not in boxes, -difference(i))):
        image = evaluation.images[index]
        size = sum(map(len, (image.lr, image.bicubic, image.hr, image.overview, *image.sr)))
        if size <= free:
            free -= size
            chosen.append(index)
    return sorted(chosen)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _json_number(value: float) -> float | str | None:
    return value if math.isfinite(value) else "inf" if value > 0 else None
