"""Image metrics on the device: fidelity, perceptual distances, color drift. Requires torch, not Ray or MLflow."""

from pipeline.metrics.metric_set import MetricSet
from pipeline.metrics.names import (
    CONSISTENCY_AND_DETAIL,
    FIDELITY,
    METRICS,
    PERCEPTUAL,
    better,
    metric_of,
)
from pipeline.metrics.weights import require, unavailable
