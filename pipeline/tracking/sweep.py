"""What the parent run of a sweep shows in MLflow: its trials' metrics, its files and the best trial."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipeline.tracking.connection import bounded_requests, cause
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.spool import now_ms

BEST_TAG = "esrgan.best_trial"
BEST_RUN_TAG = "esrgan.best_trial_run_id"
NOTE_TAG = "mlflow.note.content"
_BATCH = 1000

logger = logging.getLogger(__name__)


def log_sweep(
    parent: TrackedRun,
    metrics: Sequence[tuple[int, Mapping[str, float]]],
    files: Mapping[str, bytes],
    best: tuple[str, str | None] | None,
) -> bool:
    """Logs a sweep's result to its parent run; an unreachable server is a warning.

    Args:
        metrics: number of a trial, as the step, and its metrics.
        files: artifacts, by name.
        best: name and MLflow run id of the best trial.

    Returns whether MLflow has everything.
    """
    now = now_ms()
    points = [
        Metric(f"trial/{name}", value, now, number)
        for number, values in metrics
        for name, value in values.items()
    ]
    try:
        with (
            bounded_requests(timeout_s=30, retries=1),
            tempfile.TemporaryDirectory(prefix="esrgan-sweep-") as folder,
        ):
            client = MlflowClient(parent.uri, parent.uri)
            # A resumed sweep logs only what is new: MLflow keeps every point.
            known = {
                (key, point.step)
                for key in {point.key for point in points} & set(client.get_run(parent.run_id).data.metrics)
                for point in client.get_metric_history(parent.run_id, key)
            }
            new = [point for point in points if (point.key, point.step) not in known]
            for first in range(0, len(new), _BATCH):
                client.log_batch(parent.run_id, metrics=new[first : first + _BATCH])
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
                client.log_artifact(parent.run_id, str(Path(folder, name)))
            if best is not None:
                name, run_id = best
                client.set_tag(parent.run_id, BEST_TAG, name)
                if run_id is not None:
                    client.set_tag(parent.run_id, BEST_RUN_TAG, run_id)
                    link = f"#/experiments/{parent.experiment_id}/runs/{run_id}"
                    client.set_tag(parent.run_id, NOTE_TAG, f"Best trial: [{name}]({link})")
        return True
    except Exception as error:  # noqa: BLE001 - each database driver has its own exceptions
        logger.warning("the sweep's result was not logged to MLflow: %s", cause(error))
        return False
