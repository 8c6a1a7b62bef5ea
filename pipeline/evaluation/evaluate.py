"""Evaluates models on a set of pictures: exact means, metrics.json, a comparison picture and the report."""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
from PIL import Image

from pipeline.data.ingest.decoding import FORMATS
from pipeline.errors import UserError
from pipeline.evaluation.layout import Pair, Refused
from pipeline.evaluation.models import BICUBIC, SUFFIXES, WEIGHTS, Model
from pipeline.evaluation.picture import Panel, draw_panels
from pipeline.evaluation.progress import with_progress
from pipeline.evaluation.report import render_report
from pipeline.evaluation.scoring import Scorer, Settings, size_mismatch
from pipeline.storage import Storage

COMPARISON_ROWS = 4


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    names: list[str]
    """The models, as the user wrote them."""
    labels: list[str]
    """The same, short enough for a table."""
    settings: Settings
    images: list[dict[str, Any]]
    """One for each picture, sorted by name, as `Scorer` gives it."""
    refused: list[Refused]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.images[0]["metrics"][0])

    def mean(self, model: int) -> dict[str, float]:
        """Means over the pictures of one model's metrics; the order and the number of workers do not change a bit."""
        rows = [image["metrics"][model] for image in self.images]
        return {metric: math.fsum(row[metric] for row in rows) / len(rows) for metric in self.metrics}

    def as_json(self) -> dict[str, Any]:
        """The form of metrics.json: of the one model, or a list under `models`."""
        entries = [
            {
                "mean": self.mean(number),
                "images": [{"name": image["name"], **image["metrics"][number]} for image in self.images],
                "border": self.settings.border,
                "model": name,
            }
            for number, name in enumerate(self.names)
        ]
        result: dict[str, Any] = entries[0] if len(entries) == 1 else {"models": entries}
        if self.refused:
            result["refused"] = [{"path": each.path, "reason": each.reason} for each in self.refused]
        return result

    def means_as_json(self) -> dict[str, Any]:
        """The one model's mean, or each model's under `models`."""
        means = [{"model": name, "mean": self.mean(number)} for number, name in enumerate(self.names)]
        return self.mean(0) if len(means) == 1 else {"models": means}


def evaluate(
    scorer: Scorer, pairs: Sequence[Pair], refused: Sequence[Refused] = (), workers: int = 0
) -> Evaluation:
    """Scores every picture, in this process or on Ray's workers.

    Raises:
        UserError: the sizes of a pair do not belong together, every image was refused, or a model's output for one is
            not finite (without that image the means would flatter the model).
    """
    models = scorer.models
    scales = {model.scale for model in models}
    if scales != {scorer.settings.scale}:
        raise UserError(f"the models enlarge by {sorted(scales)}; models of one scale are compared")
    require_matching_sizes(pairs, scorer.settings.scale)
    addresses = {pair.name: pair.hr for pair in pairs}
    outcomes = []
    for outcome in with_progress(_outcomes(scorer, pairs, workers), len(pairs)):
        if "failed" in outcome:
            raise UserError(f"{addresses[outcome['name']]}: {outcome['failed']}")
        outcomes.append(outcome)
    outcomes.sort(key=lambda outcome: outcome["name"])
    unusable = [Refused(addresses[each["name"]], each["refused"]) for each in outcomes if "refused" in each]
    images = [each for each in outcomes if "refused" not in each]
    every = [*refused, *unusable]
    if not images:
        raise UserError(f"none of {len(pairs)} pictures can be evaluated; {every[0].path}: {every[0].reason}")
    return Evaluation([model.name for model in models], short_labels(models), scorer.settings, images, every)


def _outcomes(scorer: Scorer, pairs: Sequence[Pair], workers: int) -> Iterable[dict[str, Any]]:
    if workers == 0:
        return map(scorer, pairs)
    from pipeline.evaluation.spread import spread

    devices = [model.device for model in scorer.models if model.generator is not None]
    return spread(scorer, pairs, workers, devices[0] if devices else "cpu")


def write_results(evaluation: Evaluation, out: Path) -> None:
    """Writes metrics.json, report.html and comparison.png into the folder `out`."""
    storage = Storage(str(out))
    text = json.dumps(_finite(evaluation.as_json()), indent=2, ensure_ascii=False, allow_nan=False)
    page = render_report(
        evaluation.labels, evaluation.names, evaluation.metrics, evaluation.images,
        [evaluation.mean(number) for number in range(len(evaluation.names))],
        evaluation.refused, evaluation.settings,
    )  # fmt: skip
    storage.write_bytes("report.html", page.encode())
    buffer = io.BytesIO()
    draw_panels(list(_comparison(evaluation)), zoom=2).save(buffer, format="PNG", optimize=True)
    storage.write_bytes("comparison.png", buffer.getvalue())
    storage.write_bytes("metrics.json", f"{text}\n".encode())


def table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: one row for each model."""
    header = ["model", *evaluation.metrics]
    means = [evaluation.mean(number) for number in range(len(evaluation.names))]
    rows = [
        [label, *(shown(metric, mean[metric]) for metric in evaluation.metrics)]
        for label, mean in zip(evaluation.labels, means, strict=True)
    ]
    return header, rows


def shown(metric: str, value: float) -> str:
    """A metric's value with the digits that mean something."""
    return f"{value:.3f}" if metric.startswith("psnr") else f"{value:.4f}"


def short_labels(models: Sequence[Model]) -> list[str]:
    """Names for a table: the user's label, or as few of the last parts of each path as tell the models apart."""
    labels = [model.label or _short(model.name, 1) for model in models]
    for parts in range(2, 6):
        labels = [
            _short(model.name, parts) if labels.count(label) > 1 and not model.label else label
            for label, model in zip(labels, models, strict=True)
        ]
    return labels


def _short(name: str, parts: int) -> str:
    return " + ".join(_short_term(term, parts) for term in name.split(" + "))


def _short_term(term: str, parts: int) -> str:
    """`0.2 * RUN/checkpoints/gan-00000900` becomes `0.2 * gan-00000900`, models:/NAME@ALIAS becomes NAME@ALIAS."""
    factor, times, source = term.rpartition(" * ")
    if source.startswith("models:/"):
        return factor + times + source.removeprefix("models:/")
    # These two names are the same in every run.
    steps = [step for step in PurePosixPath(source).parts if step not in ("/", "checkpoints", WEIGHTS)]
    short = "/".join(steps[-parts:]) or source
    suffix = next((suffix for suffix in SUFFIXES if short.endswith(suffix)), "")
    return factor + times + short.removesuffix(suffix)


def require_matching_sizes(pairs: Sequence[Pair], scale: int) -> None:
    """Compares the sizes in the headers of all pairs before the work. Raises UserError for the first that differs."""
    for pair in pairs:
        if pair.lr is None:
            continue
        hr, lr = _header_size(pair.hr), _header_size(pair.lr)
        if hr is None or lr is None:
            continue  # refused by name later
        # EXIF may turn one of the two.
        fits = any(
            0 <= a - scale * lr[0] < scale and 0 <= b - scale * lr[1] < scale for a, b in (hr, hr[::-1])
        )
        if not fits:
            raise UserError(f"{pair.hr}: {size_mismatch(hr, lr, scale)}; check that {pair.lr} belongs to it")


def _header_size(path: str) -> tuple[int, int] | None:
    folder, _, name = path.rpartition("/")
    filesystem, base = Storage(folder or "/").filesystem()
    try:
        with (
            filesystem.open_input_file(f"{base.rstrip('/')}/{name}") as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            return image.size
    except (OSError, ValueError, SyntaxError, pyarrow.ArrowException, Image.DecompressionBombError):
        return None


def _comparison(evaluation: Evaluation) -> Iterator[list[Panel]]:
    """The first pictures: input, bicubic, each model, original, with their PSNR."""
    has_bicubic = BICUBIC in evaluation.names
    for image in evaluation.images[:COMPARISON_ROWS]:
        pictures, scale = image["pictures"], evaluation.settings.scale
        lr = _decoded(pictures["lr"])
        panels = [Panel("input", "", lr.repeat(scale, axis=0).repeat(scale, axis=1))]
        if not has_bicubic:
            panels.append(Panel(BICUBIC, "", _decoded(pictures["bicubic"])))
        for label, crop, metrics in zip(evaluation.labels, pictures["models"], image["metrics"], strict=True):
            panels.append(Panel(label, f"PSNR (Y) {metrics['psnr_y']:.2f} dB", _decoded(crop)))
        yield [*panels, Panel("original", image["name"], _decoded(pictures["hr"]))]


def _decoded(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a perfect picture's PSNR becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
