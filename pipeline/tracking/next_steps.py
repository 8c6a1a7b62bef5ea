"""The last lines of a run: its tracking URI, and the commands that show and use its results."""

import shlex

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.errors import without_secrets
from pipeline.tracking.connection import TrackingUnreachable, bounded_requests
from pipeline.tracking.uri import write_last_uri

LOCAL_SERVER = "http://127.0.0.1:5000"


def next_steps(uri: str, run_id: str, model: str | None) -> list[str]:
    """Lines for the end of a run; also makes `uri` (absolute) the tracking URI that other commands use by default.

    `model` is the registered version, models:/NAME/VERSION; None if nothing was registered.
    """
    file = write_last_uri(uri)
    shown = without_secrets(uri)
    lines = [f"tracking URI: {shown}" + (f" (the default of other commands: {file})" if file else "")]
    page = f"#/{_page(uri, run_id)}"
    if uri.startswith("http"):
        lines.append(f"MLflow UI: {shown}/{page}")
    else:
        server = f"mlflow server --backend-store-uri {shlex.quote(shown)} --workers 1"
        lines.append(f"MLflow UI: {server}, then {LOCAL_SERVER}/{page}")
    if model is not None:
        flag = "" if file else f" --tracking.uri {shlex.quote(shown)}"
        lines.append(f"upscale: python jobs/upscale.py -n {model} -i IMAGES -o OUT{flag}")
    return lines


def _page(uri: str, run_id: str) -> str:
    """Path of the run's page in the view for training runs; that of all experiments if the server is unreachable."""
    try:
        with bounded_requests(timeout_s=10, retries=0):
            experiment = MlflowClient(uri, uri).get_run(run_id).info.experiment_id
    except (MlflowException, TrackingUnreachable):
        return "experiments?workflowType=machine_learning"
    return f"experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
