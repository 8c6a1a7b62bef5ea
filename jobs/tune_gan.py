"""Runs a sweep over loss weights and residual scaling. Each trial is a complete training run; run again to resume."""

from dataclasses import asdict
from pathlib import Path

from pipeline import command

DEMO = Path(__file__).resolve().parent.parent / "configs" / "tune_demo.yaml"


def main(argv: list[str]) -> None:
    """Loads the configuration, runs the sweep, prints each trial's last validation and the best trial."""
    command.announce("sweep: loading libraries and the configuration")
    from pipeline.config import load_config

    config, options = load_config(
        argv,
        description=__doc__ or "",
        default_file=DEMO,
        add_arguments=lambda parser: parser.add_argument(
            "--json", metavar="FILE", help="Also write the result to this file."
        ),
    )
    command.require_writable_file(options.json, "--json")
    from pipeline.tuning.sweep import run_sweep

    result = run_sweep(config.alone(), config.tune, options.prepare_command)
    command.write_json(options.json, asdict(result))
    metric, fields = config.tune.metric, list(config.tune.space)
    sign = 1 if config.tune.mode == "min" else -1
    ranked = sorted(result.trials, key=lambda trial: sign * trial.metrics.get(metric, sign * float("inf")))
    rows = [
        [trial.run_name, trial.status, str(trial.step), *map(_shown, map(trial.values.get, fields)),
         f"{trial.metrics[metric]:.4f}" if metric in trial.metrics else "-"]
        for trial in ranked
    ]  # fmt: skip
    print(command.table(["trial", "status", "step", *fields, metric], rows))
    print(f"figure: {result.figure}")
    best = " ".join(f"--{name} {value}" for name, value in result.best.values.items())
    value = f"{metric} {result.best.metrics[metric]:.4f} at step {result.best.step}"
    print(f"best: {result.best.run_name} with {value}: {best}")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    command.run(main)
