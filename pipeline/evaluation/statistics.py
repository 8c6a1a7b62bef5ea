"""How certain a mean over images is: bootstrap intervals, and paired comparisons of two models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import better

RESAMPLES = 2000
_SEED = 0
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A model against another one, in one metric."""

    difference: float
    """Mean over images of its value minus the other's."""
    interval: tuple[float, float]
    """95 % of the bootstrap's mean differences."""
    wins: int
    """Images on which it is better."""
    losses: int
    """Images on which the other one is better."""

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


def bootstrap_intervals(values: Values) -> Values:
    """95 % percentile intervals of means over images (Efron 1979), as (2, columns): lower ends, upper ends.

    Images are drawn with replacement, the same for all columns; the draws depend on the number of images only. A column
    with a value that is not finite has the interval NaN to NaN.

    Args:
        values: (images, columns).
    """
    draws = np.random.default_rng(_SEED)
    count = len(values)
    with np.errstate(invalid="ignore"):
        means = np.stack([values[draws.integers(0, count, count)].mean(0) for _ in range(RESAMPLES)])
        intervals = np.percentile(means, (2.5, 97.5), axis=0)
    intervals[:, ~np.isfinite(values).all(0)] = np.nan
    return intervals


def compare(names: Sequence[str], values: Values, others: Values) -> dict[str, Comparison]:
    """A paired comparison in each metric: (images, metrics) of the model, and of the one that it is compared with."""
    with np.errstate(invalid="ignore"):
        # Two infinite values do not differ.
        differences = np.where(values == others, 0.0, values - others)
    intervals = bootstrap_intervals(differences)
    result = {}
    for column, name in enumerate(names):
        pairs = list(zip(values[:, column].tolist(), others[:, column].tolist(), strict=True))
        low, high = intervals[:, column].tolist()
        wins, losses = sum(better(name, a, b) for a, b in pairs), sum(better(name, b, a) for a, b in pairs)
        result[name] = Comparison(float(differences[:, column].mean()), (low, high), wins, losses)
    return result
