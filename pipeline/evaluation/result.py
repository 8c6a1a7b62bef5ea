"""The result of an evaluation: means, metrics.json, a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline.data.ingest.image_set import Rejected
from pipeline.evaluation.models import BICUBIC, Model
from pipeline.evaluation.scoring import ImageScore, Settings
from pipeline.evaluation.statistics import Comparison, Values, bootstrap_intervals, compare
from pipeline.metrics import METRICS
from pipeline.model import generator_sha256
from pipeline.model.weights import SIZES
from pipeline.training.model_source import GENERATOR_FILE, SUFFIXES


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
    origins: Sequence[Mapping[str, Any]] = ()
    """For each model, what it was exactly; see `origin_of`."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """How the images were made and scored."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all values of an image: the metrics, and the parts of color_drift."""
        return tuple(self.images[0].metrics[0])

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, for tables."""
        return tuple(name for name in self.columns if name in METRICS)

    def _values(self, model: int) -> Values:
        """(images, metrics)."""
        return np.array([[image.metrics[model][name] for name in self.metrics] for image in self.images])

    @cached_property
    def intervals(self) -> list[dict[str, tuple[float, float]]]:
        """For each model, 95 % intervals of the means; empty for a single image."""
        if len(self.images) < 2:
            return [{} for _ in self.names]
        ends = [bootstrap_intervals(self._values(model)) for model in range(len(self.names))]
        return [dict(zip(self.metrics, zip(*each.tolist(), strict=True), strict=True)) for each in ends]

    @cached_property
    def comparisons(self) -> list[dict[str, Comparison]]:
        """Each model but the first against the first; empty for a single image."""
        if len(self.images) < 2:
            return []
        first = self._values(0)
        return [compare(self.metrics, self._values(model), first) for model in range(1, len(self.names))]

    @property
    def means(self) -> list[dict[str, float]]:
        """For each model, means over the images: bit-identical for any order of arrival and number of workers."""
        return [
            self._mean([image.metrics[model] for image in self.images]) for model in range(len(self.names))
        ]

    @property
    def baseline(self) -> dict[str, float]:
        """Means of bicubic upscaling."""
        return self._mean([image.baseline for image in self.images])

    def _mean(self, values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: math.fsum(each[name] for each in values) / len(values) for name in self.columns}

    @property
    def shown_means(self) -> list[tuple[str, dict[str, float]]]:
        """Labels and means for tables: of all models, and first of bicubic, if it is none of them."""
        models = list(zip(self.labels, self.means, strict=True))
        return models if BICUBIC in self.names else [(BICUBIC, self.baseline), *models]

    def as_json(self) -> dict[str, Any]:
        """The content of metrics.json: of the one model, or a list under `models`."""
        entries = []
        for number, (name, mean) in enumerate(zip(self.names, self.means, strict=True)):
            entry: dict[str, Any] = {
                "mean": mean,
                "images": [{"name": image.name, **image.metrics[number]} for image in self.images],
                "border": self.settings.border,
                "model": name,
                "label": self.labels[number],
                **(self.origins[number] if self.origins else {}),
            }
            if self.intervals[number]:
                entry["interval"] = self.intervals[number]
            if number and self.comparisons:
                compared = self.comparisons[number - 1]
                entry["against_first"] = {metric: asdict(each) for metric, each in compared.items()}
            entries.append(entry)
        result: dict[str, Any] = entries[0] if len(entries) == 1 else {"models": entries}
        result["bicubic"] = self.baseline
        if self.protocol:
            result["protocol"] = dict(self.protocol)
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
            [label, *(METRICS[metric].shown(mean[metric]) for metric in self.metrics)]
            for label, mean in self.shown_means
        ]
        return ["model", *self.metrics], rows

    def comparison_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows for a terminal: each model against the first in each metric; no rows for a single image."""
        rows = [
            [
                f"{label}, {metric}",
                METRICS[metric].shown(each.difference, "+"),
                " to ".join(METRICS[metric].shown(end, "+") for end in each.interval),
                f"{each.wins} of {len(self.images)}",
            ]
            for label, compared in zip(self.labels[1:], self.comparisons, strict=False)
            for metric, each in compared.items()
        ]
        return [f"against {self.labels[0]}", "difference", "95 % interval", "better on"], rows


def origin_of(model: Model) -> dict[str, Any]:
    """What a model was exactly: the resolved address, the digest of its weights, and its sizes; empty for bicubic."""
    if model.generator is None:
        return {}
    return {
        "origin": model.origin,
        "generator_sha256": generator_sha256(model.generator.state_dict()),
        **{key: model.info[key] for key in SIZES},
    }


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
    path = [part for part in PurePosixPath(source).parts if part not in ("/", "checkpoints", GENERATOR_FILE)]
    short = "/".join(path[-parts:]) or source
    suffix = next((suffix for suffix in SUFFIXES if short.endswith(suffix)), "")
    return factor + times + short.removesuffix(suffix)
