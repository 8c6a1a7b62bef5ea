"""Evaluates models on a set of images: exact means, metrics.json, a comparison figure and the report."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import pyarrow
from PIL import Image as PillowImage

from pipeline.data.ingest.decoding import FORMATS
from pipeline.data.ingest.image_set import Pair, Rejected, find_pairs, size_mismatch
from pipeline.errors import UserError, is_installed
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.models import (
    BICUBIC,
    Model,
    choose_device,
    interpolated,
    notes,
    open_model,
    split_label,
)
from pipeline.evaluation.result import Evaluation, origin_of, short_labels
from pipeline.evaluation.scoring import ImageScore, Scorer, Settings
from pipeline.imaging.arrays import decoded, encoded
from pipeline.imaging.panels import Panel, draw_panels, nearest_upscale
from pipeline.json_file import json_text
from pipeline.metrics import (
    CONSISTENCY_AND_DETAIL,
    FIDELITY,
    METRICS,
    PERCEPTUAL,
    MetricSet,
    unavailable,
)
from pipeline.progress import progress_bar
from pipeline.storage import Storage

COMPARISON_ROWS = 4


def run_evaluation(config: EvaluateConfig) -> Evaluation:
    """Opens the models, scores the images, and writes metrics.json, report.html and comparison.png.

    Notes about the models and the images are printed.

    Raises:
        UserError: an unusable model, device, image folder or output folder; see also `evaluate`.
    """
    out = Storage(config.out)
    out.require_writable("--out")
    device = choose_device(config.device, config.workers)
    models, scale = _open_models(config, device)
    labels = short_labels(models)
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"--model: two models have the label {twice!r}; distinguish them by LABEL=M")
    pairs, rejected = find_pairs(config.hr, config.lr, scale)
    unknown = config.crop.keys() - {pair.name for pair in pairs}
    if unknown:
        raise UserError(f"--crop {min(unknown)}: no image of this name in {config.hr}")
    border = scale if config.border is None else config.border
    settings = Settings(scale, border, config.tile, boxes=config.crop)
    names, missing = _metrics(config)
    for line in [*notes(models), *missing]:
        print(f"note: {line}")
    metrics = MetricSet(names, border=border, folder=config.weights_folder)
    scorer = Scorer(models, settings, metrics, device)
    result = evaluate(scorer, pairs[: config.limit], rejected, config.workers)
    result = replace(result, protocol=_protocol(config, settings, result, pairs))
    _write_results(result, out)
    return result


def _open_models(config: EvaluateConfig, device: str) -> tuple[list[Model], int]:
    """All models, and their scale: the given one, the first network's, or 4."""

    def opened(source: str, bicubic_scale: int = 4) -> Model:
        return open_model(
            source,
            config.tracking_uri,
            device=device,
            precision=config.precision,
            bicubic_scale=bicubic_scale,
        )

    networks = {source: opened(source) for source in config.model if split_label(source)[1] != BICUBIC}
    mixed = [interpolated(opened(a), opened(b), alpha) for a, b, alpha in config.interpolate]
    scale = config.scale or next((model.scale for model in [*networks.values(), *mixed]), 4)
    models = [networks[source] if source in networks else opened(source, scale) for source in config.model]
    return [*models, *mixed], scale


def _protocol(
    config: EvaluateConfig, settings: Settings, result: Evaluation, pairs: Sequence[Pair]
) -> dict[str, Any]:
    """What determines the numbers in addition to the models, and when and with what they were computed."""
    with_lr = config.lr or config.hr
    packages = ["torch", "numpy", "pillow", *(["torchmetrics"] if is_installed("torchmetrics") else [])]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hr": Storage(config.hr).uri,
        "lr": Storage(with_lr).uri if pairs[0].lr else "computed from the HR images by MATLAB's bicubic",
        "images": len(result.images),
        "scale": settings.scale,
        "border": settings.border,
        "y": "BT.601 luma, 16 to 235, not rounded",
        "tile_px": settings.tile_px,
        "precision": config.precision,
        "device": config.device,
        "versions": {name: metadata.version(name) for name in packages},
    }


def _metrics(config: EvaluateConfig) -> tuple[tuple[str, ...], list[str]]:
    """The requested metrics, or those with weights, after those that need none; and notes about the others."""
    chosen: Sequence[str] = config.metrics or (PERCEPTUAL if config.metrics is None else tuple(METRICS))
    missing = {} if config.metrics else unavailable(chosen, config.weights_folder)
    found = (name for name in chosen if name not in missing)
    names = tuple(dict.fromkeys((*FIDELITY, *CONSISTENCY_AND_DETAIL, *found)))
    if config.metrics is None and len(missing) < len(chosen):
        return names, []  # one perceptual metric is enough
    return names, [f"{name} is skipped; {reason}" for name, reason in missing.items()]


def evaluate(
    scorer: Scorer, pairs: Sequence[Pair], rejected: Sequence[Rejected] = (), workers: int = 0
) -> Evaluation:
    """Scores every image, in this process or on Ray's workers.

    Raises:
        UserError: the sizes of a pair do not match, every image was rejected, or a model's output for one is not
            finite (without that image the means would flatter the model).
    """
    models = scorer.models
    scales = {model.scale for model in models}
    if scales != {scorer.settings.scale}:
        raise UserError(
            f"the models have the scales {sorted(scales)}; only models of one scale can be compared"
        )
    _require_matching_sizes(pairs, scorer.settings.scale)
    outcomes: Iterable[ImageScore | Rejected] = map(scorer, pairs)
    if workers:
        from pipeline.evaluation.ray_workers import map_on_ray

        outcomes = map_on_ray(scorer, pairs, workers, scorer.device)
    images: list[ImageScore] = []
    unusable: list[Rejected] = []
    for outcome in progress_bar(outcomes, total=len(pairs), unit=" images"):
        if isinstance(outcome, ImageScore):
            images.append(outcome)
        else:
            unusable.append(outcome)
    # Workers finish in any order.
    images.sort(key=lambda image: image.name)
    unusable.sort(key=lambda each: each.path)
    excluded = [*rejected, *unusable]
    if not images:
        raise UserError(
            f"none of {len(pairs)} images can be evaluated; {excluded[0].path}: {excluded[0].reason}"
        )
    names, origins = [model.name for model in models], [origin_of(model) for model in models]
    return Evaluation(names, short_labels(models), scorer.settings, images, excluded, origins)


def _write_results(evaluation: Evaluation, out: Storage) -> None:
    """Writes metrics.json (last), report.html and comparison.png."""
    missing = [name for name in ("jinja2", "matplotlib") if not is_installed(name)]
    if missing:
        print(f"note: report.html is not written; it needs the package {' and '.join(missing)}")
    else:
        from pipeline.evaluation.report import render_report

        out.write_bytes("report.html", render_report(evaluation).encode(errors="backslashreplace"))
    figure = draw_panels(list(_comparison(evaluation)), zoom=2)
    out.write_bytes("comparison.png", encoded(figure, "PNG", optimize=True))
    out.write_bytes("metrics.json", json_text(evaluation.as_json()).encode(errors="backslashreplace"))


def _comparison(evaluation: Evaluation) -> Iterator[list[Panel]]:
    """The first images: input, bicubic, each model, original, with their PSNR."""
    for image in evaluation.images[:COMPARISON_ROWS]:
        panels = [Panel("input", "", nearest_upscale(decoded(image.lr), evaluation.settings.scale))]
        if BICUBIC not in evaluation.names:
            panels.append(Panel(BICUBIC, "", decoded(image.bicubic)))
        for label, crop, metrics in zip(evaluation.labels, image.sr, image.metrics, strict=True):
            panels.append(Panel(label, f"PSNR (Y) {metrics['psnr_y']:.2f} dB", decoded(crop)))
        yield [*panels, Panel("original", image.name, decoded(image.hr))]


def _require_matching_sizes(pairs: Sequence[Pair], scale: int) -> None:
    """Compares the sizes in the headers of all pairs before the work. Raises UserError for the first that differs."""
    for pair in pairs:
        if pair.lr is None:
            continue
        hr, lr = _header_size(pair.hr), _header_size(pair.lr)
        if hr is None or lr is None:
            continue  # rejected later, with its reason
        # EXIF may rotate one of the two.
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
            PillowImage.open(file, formats=FORMATS) as image,
        ):
            return image.size
    except (OSError, ValueError, SyntaxError, pyarrow.ArrowException, PillowImage.DecompressionBombError):
        return None
