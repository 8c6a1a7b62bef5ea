"""The result of an evaluation: means, metrics.json, a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline.data.ingest.image_set import Rejected
from pipeline.evaluation.models import SUFFIXES, WEIGHTS, Model
from pipeline.evaluation.scoring import ImageScore, Settings


@dataclass(frozen=True)
class Evaluation:
    """Scores of all models on all images."""

    names: list[str]
    """The models, as the user wrote them."""
    labels: list[str]
    """The same, shortened for tables."""
    settings: Settings
    images: list[ImageScore]
    """Sorted by name."""
    rejected: list[Rejected]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.images[0].metrics[0])

    @property
    def means(self) -> list[dict[str, float]]:
        """For each model, means over the images: bit-identical for any order of arrival and number of workers."""
        return [
            {
                metric: math.fsum(image.metrics[model][metric] for image in self.images) / len(self.images)
                for metric in self.metrics
            }
            for model in range(len(self.names))
        ]

    def as_json(self) -> dict[str, Any]:
        """The content of metrics.json: of the one model, or a list under `models`."""
        entries = [
            {
                "mean": mean,
                "images": [{"name": image.name, **image.metrics[number]} for image in self.images],
                "border": self.settings.border,
                "model": name,
            }
            for number, (name, mean) in enumerate(zip(self.names, self.means, strict=True))
        ]
        result: dict[str, Any] = entries[0] if len(entries) == 1 else {"models": entries}
        if self.rejected:
            result["refused"] = [{"path": each.path, "reason": each.reason} for each in self.rejected]
        return result

    def means_as_json(self) -> dict[str, Any]:
        """The one model's means, or each model's under `models`."""
        if len(self.names) == 1:
            return self.means[0]
        return {
            "models": [
                {"model": name, "mean": mean} for name, mean in zip(self.names, self.means, strict=True)
            ]
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows for a terminal: one row for each model."""
        rows = [
            [label, *(_shown(metric, value) for metric, value in mean.items())]
            for label, mean in zip(self.labels, self.means, strict=True)
        ]
        return ["model", *self.metrics], rows


def _shown(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric.startswith("psnr") else f"{value:.4f}"


def short_labels(models: Sequence[Model]) -> list[str]:
    """Names for a table: the user's label, or the fewest last parts of each path that distinguish the models."""
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
    path = [part for part in PurePosixPath(source).parts if part not in ("/", "checkpoints", WEIGHTS)]
    short = "/".join(path[-parts:]) or source
    suffix = next((suffix for suffix in SUFFIXES if short.endswith(suffix)), "")
    return factor + times + short.removesuffix(suffix)
