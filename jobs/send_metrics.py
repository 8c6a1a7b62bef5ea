"""Uploads what MLflow lacks of a run after an outage: metrics, status and generator."""

import argparse
import os

from pipeline import command


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = command.make_parser(__doc__ or "")
    add = flags.add_argument
    add("--run", required=True, metavar="STORAGE/RUN_NAME", help="The run's folder, or its s3:// prefix.")
    add(
        "--tracking.uri",
        dest="tracking_uri",
        metavar="URI",
        help="The MLflow tracking server (default: ESRGAN_TRACKING__URI, then the one that the run was trained with; "
        "for a run without one MLFLOW_TRACKING_URI, then the last training run's).",
    )
    add(
        "--tracking.model_name",
        dest="model_name",
        metavar="NAME",
        help="Register the generator under this name (default: the run's tracking.model_name).",
    )
    add("--json", metavar="FILE", help="Also write {run_id, status, sent, model_version} there.")
    return flags


def main(argv: list[str]) -> None:
    """Uploads, and prints the number of segments and the registered version."""
    command.announce("sending a run to MLflow: loading libraries")
    from pipeline.storage import Storage
    from pipeline.tracking.pending import upload_pending

    options = parser().parse_args(argv)
    command.require_writable_file(options.json, "--json")
    uri = options.tracking_uri or os.environ.get("ESRGAN_TRACKING__URI")
    result = upload_pending(Storage(options.run), uri, options.model_name)
    registered = result.registered
    content = {
        "run_id": result.run_id,
        "status": result.status,
        "sent": result.sent,
        "model_version": registered.version if registered else None,
    }
    command.write_json(options.json, content)
    what = f"{result.sent} segments sent" if result.sent else "nothing to send"
    print(f"{what}; run {result.run_id} is marked {result.status}")
    if registered:
        print(f"registered {registered.name} version {registered.version}: {registered.reason}")


if __name__ == "__main__":
    command.run(main)
