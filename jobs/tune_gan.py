"""Runs a sweep over loss weights and residual scaling. Each trial is a complete training run; run again to resume."""

from dataclasses import asdict
from pathlib import Path

from pipeline import command

DEMO = Path(__file__).resolve().parent.parent / "configs" / "tune_demo.yaml"
FLAGS = {
    "--retry-failed": {
        "action": "store_true",
        "help": "Also repeat the trials that failed in training; those that lost their process or could not write are "
        "repeated anyway.",
    }
}


def main(argv: list[str]) -> None:
    """Loads the configuration, runs the sweep, prints the trials and the best one."""
    command.announce("sweep: loading libraries and the configuration")
    from pipeline.config import load_config

    config, options = load_config(argv, description=__doc__ or "", default_file=DEMO, own_flags=FLAGS)
    from pipeline.tuning.result import result_lines, trial_table
    from pipeline.tuning.sweep import run_sweep

    result = run_sweep(config.alone(), config.tune, options.prepare_command, options.retry_failed)
    command.write_json(options.json, asdict(result))
    print(command.table(*trial_table(config.tune, result)))
    for line in result_lines(config.tune, result):
        print(line)


if __name__ == "__main__":
    command.run(main)
