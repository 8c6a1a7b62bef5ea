"""Trains ESRGAN: stage 1 on the pixel loss, stage 2 with a discriminator. Run again to resume."""

from dataclasses import asdict
from pathlib import Path

from pipeline import command

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
FLAGS = {
    "--accept-changes": {
        "action": "store_true",
        "help": "Resume a run although its configuration, its data set or package versions have changed.",
    }
}


def main(argv: list[str]) -> None:
    """Loads the configuration, trains, prints the result."""
    command.announce("training: loading libraries and the configuration")
    from pipeline.config import load_config
    from pipeline.tracking.uri import resolve_uri
    from pipeline.training.conclude import result_lines
    from pipeline.training.run import run_training

    config, options = load_config(argv, description=__doc__ or "", default_file=DEMO, own_flags=FLAGS)
    result = run_training(
        config, accept_changes=options.accept_changes, prepare_command=options.prepare_command
    )
    command.write_json(options.json, asdict(result))
    model = None
    if result.model_version is not None:
        model = f"models:/{config.tracking.model_name}/{result.model_version}"
    print(*result_lines(result, model), sep="\n")
    if result.run_id is not None and config.tracking.enabled:
        from pipeline.tracking.next_steps import next_steps

        uri = resolve_uri(config.tracking, config.storage)
        print(*next_steps(uri, result.run_id, model), sep="\n")


if __name__ == "__main__":
    command.run(main)
