"""Sweeps: every trial a Ray Train run under one parent in MLflow; killed and resumed; stopped early."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlflow import MlflowClient
from PIL import Image
from tiny import fields, flags, write_sets

from pipeline.config import load_config
from pipeline.data import prepare
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.tuning.sweep import Outcome, outcomes, run_sweep

SPACE = {
    "gan.adversarial_weight": {"low": 1e-4, "high": 5e-2, "log": True},
    "model.residual_scale": {"choice": [0.1, 0.2]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sweep"))


def sweep_fields(folder: Path, **changes: Any) -> dict[str, Any]:
    return fields(
        folder,
        **{"workers": 1, "tune.name": "sweep", "tune.trials": 3, "tune.space": SPACE, **changes},
    )


def command(folder: Path, **changes: Any) -> list[str]:
    return tiny.command("tune_gan", folder, sweep_fields(folder, **changes))


def environment() -> dict[str, str]:
    # A Ray of its own, with the dashboard that stopped trials need.
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def children(folder: Path, parent: str) -> dict[str, Any]:
    """MLflow's runs below the parent, by name."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_name: run for run in runs}


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_names_the_best(folder: Path) -> None:
    # At this rate PSNR falls between the last two validations, so the last one is not the best.
    changes = {"gan.learning_rate": 1e-2}
    tiny.run_until(command(folder, **changes), "(1/3)", environment())
    sweep = Storage(str(folder / "runs" / "sweep"))
    first = outcomes(sweep)
    assert len(first) == 1

    result_file = folder / "result.json"
    again = [*command(folder, **changes), "--json", str(result_file)]
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep sweep: 1 trials ended before" in done.stdout
    trials = outcomes(sweep)
    assert len(trials) == 3
    assert first[0] in trials
    assert all((trial.status, trial.step) == ("finished", 12) for trial in trials)
    for trial in trials:
        last = checkpoints.newest(sweep / "trials" / trial.run_name)
        assert last is not None
        assert (last.scalars["metrics_step"], last.scalars["metrics"]) == (12, trial.metrics)

    result = json.loads(result_file.read_text())
    assert set(result) >= {"run_id", "trials", "best"}
    best = max(trials, key=lambda trial: trial.metrics["psnr_y"])
    assert result["best"]["run_name"] == best.run_name
    assert f"best: {best.run_name}" in done.stdout
    with Image.open(sweep.path("tradeoff.png")) as picture:
        assert picture.width > 300

    tracked = children(folder, result["run_id"])
    assert {trial.run_name for trial in trials} <= set(tracked)
    for trial in trials:
        run = tracked[trial.run_name]
        assert run.info.status == "FINISHED"
        assert float(run.data.params["model.residual_scale"]) == trial.values["model.residual_scale"]
        assert run.data.metrics["validation/psnr_y"] == pytest.approx(trial.metrics["psnr_y"])

    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/sweep/outcomes").iterdir()}
    third = subprocess.run(again, env=environment(), capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert "has ended with 3 trials; nothing to do" in third.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs/sweep/outcomes").iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_is_killed_between_validations_resumes(folder: Path) -> None:
    # The only validations are at steps 6 and 306.
    changes = {
        "tune.name": "between",
        "tune.trials": 1,
        "gan.steps": 300,
        "checkpoint_every_steps": 10,
        "validate_every_steps": 1000,
    }
    tiny.run_until(command(folder, **changes), "step 25/306", environment())
    sweep = Storage(str(folder / "runs" / "between"))
    (trial_name,) = sweep.names("trials")
    assert 20 <= checkpoints.listed(sweep / "trials" / trial_name)[-1].step < 300
    again = command(folder, **changes)
    done = subprocess.run(again, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (trial,) = outcomes(sweep)
    assert (trial.status, trial.step) == ("finished", 306)


@pytest.mark.ray
@pytest.mark.slow
def test_asha_stops_weak_trials_and_their_cpus_come_back(folder: Path) -> None:
    changes = {
        "run_name": "t", "tune.name": "early", "tune.trials": 4, "tune.scheduler": "asha", "tune.grace_steps": 3,
        "tune.reduction_factor": 2,
    }  # fmt: skip
    done = subprocess.run(
        command(folder, **changes), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = outcomes(Storage(str(folder / "runs" / "early")))
    assert len(trials) == 4
    statuses = [trial.status for trial in trials]
    assert set(statuses) == {"finished", "stopped"}
    best = max(
        (trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.metrics["psnr_y"]
    )
    assert f"best: {best.run_name}" in done.stdout


def load(folder: Path, **changes: Any) -> Any:
    config, _ = load_config(flags(sweep_fields(folder, **changes)), description="", environment={})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune.space": {"gan.beauty": {"low": 0.1, "high": 1.0}}}, "gan.beauty"),
        ({"tune.space": {"gan.pixel_weight": {"low": -1.0, "high": 1.0}}}, "gan.pixel_weight"),
        ({"tune.space": {"model.residual_scale": {"choice": ["much"]}}}, "model.residual_scale"),
        ({"tune.metric": "beauty"}, "tune.metric=beauty"),
        ({"workers": 0}, "workers=0"),
        ({"data.source": "/no/such/folder", "data.root": "/tmp/nowhere"}, "data.source=/no/such/folder"),
    ],
)
def test_a_mistake_is_found_before_ray_starts(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_sweep(load(folder, **{"tune.name": "mistake", **changes}))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_sweep_without_a_held_out_set_is_refused_before_ray_starts(folder: Path, prepared: bool) -> None:
    root = folder / f"without-held-out-{prepared}"
    values = sweep_fields(folder, **{"tune.name": "unmeasured", "data.root": str(root)})
    del values["data.held_out"]
    config, _ = load_config(flags(values), description="", environment={})
    if prepared:
        prepare(config.data, progress=False, on_ray=False)
    with pytest.raises(UserError, match=r"held.out set|data\.held_out: not set") as caught:
        run_sweep(config)
    assert "ranks its trials by psnr_y" in str(caught.value)
    assert not (folder / "runs" / "unmeasured").exists()


def test_outcomes_read_back(tmp_path: Path) -> None:
    from pipeline.tuning.sweep import _keep

    sweep = Storage(str(tmp_path))
    outcome = Outcome(
        "trial-1", "id", {"gan.pixel_weight": 0.1, "kind": "a"}, "failed", 3, {"psnr_y": 20.0}, "why"
    )
    _keep(sweep, outcome)
    assert outcomes(sweep) == [outcome]
