"""Sweeps: each trial is a Ray Train run below one parent run in MLflow; killed and resumed; stopped early."""

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
from evaluation_helpers import job
from mlflow import MlflowClient
from PIL import Image
from tiny import fields, flags, write_sets

from pipeline.config import load_config
from pipeline.data import prepare
from pipeline.errors import UserError
from pipeline.run_folder import TRIAL_VALUES, TrialOutcome
from pipeline.storage import Storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.figure import tradeoff_figure
from pipeline.tuning.sweep import SweepResult, run_sweep
from pipeline.tuning.sweep_folder import claim, keep_outcome, outcomes, unfinished

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
    # Without RAY_ADDRESS the command starts a private Ray, with the dashboard that stopped trials need.
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
def test_a_killed_sweep_resumes_and_reports_the_best_trial(folder: Path) -> None:
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
    assert "resuming sweep sweep: 1 trials have ended" in done.stdout
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
    with Image.open(sweep.path("tradeoff.png")) as figure:
        assert figure.width > 300

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
    assert "has finished with 3 trials; nothing to do" in third.stdout
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
def test_asha_stops_weak_trials_and_frees_their_cpus(folder: Path) -> None:
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


def run(values: dict[str, Any]) -> None:
    config, _ = load_config(flags(values), description="", environment={})
    run_sweep(config.alone(), config.tune)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune.space": {"gan.beauty": {"low": 0.1, "high": 1.0}}}, "gan.beauty"),
        ({"tune.space": {"gan.pixel_weight": {"low": -1.0, "high": 1.0}}}, "gan.pixel_weight"),
        ({"tune.space": {"tune.trials": {"low": 1, "high": 2}}}, "tune.space: tune: no such field"),
        ({"tune.space": {"model.residual_scale": {"choice": ["much"]}}}, "model.residual_scale"),
        ({"tune.metric": "beauty"}, "tune.metric=beauty"),
        ({"workers": 0}, "workers=0"),
        ({"data.source": "/no/such/folder", "data.root": "/tmp/nowhere"}, "data.source=/no/such/folder"),
    ],
)
def test_invalid_input_is_refused_before_ray_starts(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(sweep_fields(folder, **{"tune.name": "invalid", **changes}))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_sweep_without_a_held_out_set_is_refused_before_ray_starts(folder: Path, prepared: bool) -> None:
    root = folder / f"without-held-out-{prepared}"
    values = sweep_fields(folder, **{"tune.name": "unmeasured", "data.root": str(root)})
    del values["data.held_out"]
    if prepared:
        config, _ = load_config(flags(values), description="", environment={})
        prepare(config.data, progress=False, on_ray=False)
    with pytest.raises(UserError, match=r"held.out set|data\.held_out: not set") as caught:
        run(values)
    assert "ranks its trials by psnr_y" in str(caught.value)
    assert not (folder / "runs" / "unmeasured").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("outcomes/trial-1.json", "remove it to run the trial again"),
        ("sweep.json", "restore it or choose another tune.name"),
    ],
)
def test_a_corrupt_file_of_a_sweep_is_refused_before_ray_starts(
    folder: Path, tmp_path: Path, name: str, remedy: str
) -> None:
    file = tmp_path / "corrupt" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b'{"run_name": ')
    with pytest.raises(UserError, match=rf"{name}: corrupt \(.+\); {remedy}") as caught:
        run(sweep_fields(folder, **{"tune.name": "corrupt", "storage": str(tmp_path)}))
    assert "\n" not in str(caught.value)


def test_outcomes_read_back(tmp_path: Path) -> None:
    sweep = Storage(str(tmp_path))
    outcome = TrialOutcome(
        "trial-1", "id", {"gan.pixel_weight": 0.1, "kind": "a"}, "failed", 3, {"psnr_y": 20.0}, "why"
    )
    keep_outcome(sweep, outcome)
    assert outcomes(sweep) == [outcome]


def test_trials_without_an_outcome_are_unfinished(tmp_path: Path) -> None:
    sweep = Storage(str(tmp_path))
    for number in (1, 2):
        TRIAL_VALUES.at(name=f"trial-{number}").write(sweep, {"gan.pixel_weight": number / 10})
    (tmp_path / "trials" / "trial-3").mkdir()
    assert unfinished(sweep, {"trial-1"}) == [{"gan.pixel_weight": 0.2}]


def test_a_sweep_resumes_only_with_the_same_search_space_and_learning_fields(tmp_path: Path) -> None:
    sweep, settings = Storage(str(tmp_path)), TuneConfig(name="sweep")
    claim(sweep, TrainConfig(), settings)
    claim(sweep, TrainConfig(workers=2), TuneConfig(name="sweep", trials=99))
    with pytest.raises(UserError, match=r"tune\.name=sweep is in use with other values of seed, tune\.mode;"):
        claim(sweep, TrainConfig(seed=1), TuneConfig(name="sweep", mode="min"))


@pytest.mark.parametrize(("mode", "expected"), [("max", ["b", "a", "c"]), ("min", ["a", "b", "c"])])
def test_trials_are_listed_from_the_best(
    mode: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", {"psnr_y": 20.0}), ("b", {"psnr_y": 21.0}), ("c", {})]
    trials = [TrialOutcome(f"trial-{name}", None, {}, "finished", 3, metrics) for name, metrics in rows]
    result = SweepResult("run", trials, trials[0], "tradeoff.png")
    monkeypatch.setattr("pipeline.tuning.sweep.run_sweep", lambda *arguments: result)
    job("tune_gan")(["--tune.mode", mode])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line.startswith("trial-")] == [
        f"trial-{name}" for name in expected
    ]


def test_the_figure_has_a_panel_for_each_field_and_omits_trials_without_the_metric() -> None:
    def trial(number: int, status: str, metrics: dict[str, float], **values: Any) -> TrialOutcome:
        return TrialOutcome(f"trial-{number}", None, values, status, 3, metrics)

    best = trial(1, "finished", {"psnr_y": 20.0}, rate=0.001, kind="a")
    others = [
        trial(2, "stopped", {"psnr_y": 19.0}, rate=0.1, kind="b"),
        trial(3, "failed", {}, rate=0.2, kind="b", other=1.0),
    ]
    with Image.open(io.BytesIO(tradeoff_figure([best, *others], "psnr_y", best))) as figure:
        assert figure.format == "PNG"
        assert figure.width == pytest.approx(2 * 3.2 * 110, abs=2)
