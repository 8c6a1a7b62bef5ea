"""What a sweep leaves: best.yaml, the report, and what MLflow shows of it."""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from tiny import write_sets
from tuning_helpers import configurations, open_queue, run_all

from pipeline.config import load_config
from pipeline.run_folder import TrialOutcome, TrialPlan
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.run import open_parent
from pipeline.tracking.sweep import log_sweep
from pipeline.training.config import TrainConfig
from pipeline.training.run import run_training
from pipeline.tuning.best_config import best_config, best_yaml
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ranking import compare_trials
from pipeline.tuning.report import marks, summary
from pipeline.tuning.space import trial_name
from pipeline.tuning.takeaway import importances, sweep_files


def outcome(number: int, status: str = "finished", **metrics: float) -> TrialOutcome:
    values = {"gan.pixel_weight": number / 10, "psnr.learning_rate": 1e-4}
    return TrialOutcome(f"trial-{number}", f"id{number}", values, status, 12, metrics, number=number)


def decoded_figures(page: str) -> list[str]:
    """The SVG files in a report."""
    encoded = page.split("data:image/svg+xml;base64,")[1:]
    return [base64.b64decode(text.partition('"')[0]).decode() for text in encoded]


@pytest.mark.slow
def test_the_files_of_a_sweep(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    changes = {
        "tune.name": "files",
        "tune.trials": 2,
        "tune.metrics": ["psnr_y", "ssim_y"],
        "tune.points": [{}],
    }
    changes["tune.space"] = {"gan.pixel_weight": {"low": 1e-3, "high": 1.0, "log": True}}
    queue = open_queue(folder, **changes)
    run_all(queue)
    trials = list(queue.outcomes.values())
    files = sweep_files(queue, compare_trials(queue.settings, trials), trials)
    assert set(files) == {"tradeoff.png", "report.html", "study.db"}
    page = files["report.html"].decode()
    for name in queue.outcomes:
        assert name in page
    # In the table, below its crop of each image and as their alternative text; in the Pareto figure.
    assert page.count("tune.points[0]") == 5
    assert "tune.points[0]" in decoded_figures(page)[0]
    assert "(knee)" in page
    assert page.count("data:image/svg+xml") == 3
    # Two images: input, bicubic, two trials, original.
    assert page.count("data:image/webp") == 10
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_training_starts_from_best_yaml(tmp_path: Path) -> None:
    folder = write_sets(tmp_path)
    queue = open_queue(folder, **{"tune.trials": 1})
    config, settings = configurations(folder, **{"tune.trials": 1})
    best = TrialOutcome("trial-1", None, {"gan.adversarial_weight": 0.01}, "finished", 12, {"psnr_y": 25.0})
    (folder / "best.yaml").write_bytes(best_yaml(config, settings, best))
    shorter = ["--workers", "0", "--psnr.steps", "1", "--gan.steps", "1"]
    loaded, _ = load_config(["--config", str(folder / "best.yaml"), *shorter], description="", environment={})
    result = run_training(loaded.alone())
    assert (result.step, result.run_name) == (2, "sweep-best")
    assert queue.sweep.names() == []  # not the folder of the sweep


def test_best_yaml_is_a_full_length_configuration_with_the_best_values(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "psnr": {"steps": 40, "schedule": {"shape": "cosine"}},
            "gan": {"steps": 20, "schedule": {"shape": "constant"}},
            "tracking": {"uri": "https://user:hunter2@server"},
            "workers": 4,
        }
    )
    space = {"gan.pixel_weight": {"low": 0.0, "high": 1.0}, "psnr.learning_rate": {"choice": [1e-4]}}
    settings = TuneConfig.model_validate({"name": "s", "space": space})
    content = best_yaml(config, settings, outcome(3, psnr_y=20.0))
    assert b"hunter2" not in content
    (tmp_path / "best.yaml").write_bytes(content)
    best = load_config(["--config", str(tmp_path / "best.yaml")], description="", environment={})[0]
    assert (best.run_name, best.workers) == ("s-best", 4)
    assert (best.gan.pixel_weight, best.psnr.learning_rate) == (0.3, 1e-4)
    assert (best.psnr.steps, best.gan.steps, best.validate_every_steps) == (1_000_000, 400_000, 5000)
    assert best.gan.schedule == TrainConfig().gan.schedule


@pytest.mark.parametrize("name", ["tune_demo.yaml", "tune_x4.yaml"])
def test_the_model_trained_from_best_yaml_is_registered(name: str) -> None:
    file = Path(__file__).parent.parent / "configs" / name
    config, _ = load_config([], description="", default_file=file, environment={})
    best = TrialOutcome("trial-1", None, config.tune.points[0], "finished", 12, {"psnr_y": 25.0})
    assert best_config(config.alone(), config.tune, best).tracking.register_model


def test_best_yaml_of_a_sweep_with_the_longest_name(tmp_path: Path) -> None:
    config, settings = configurations(tmp_path, **{"tune.name": "n" * 100})
    best = TrialOutcome("trial-1", None, {"gan.adversarial_weight": 0.01}, "finished", 12, {"psnr_y": 25.0})
    assert best_config(config, settings, best).run_name == "n" * 95 + "-best"


def test_trials_with_equal_values_have_no_importances() -> None:
    settings = TuneConfig.model_validate({"space": {"crop_px": {"low": 32, "high": 64}}})
    plans = [TrialPlan(number, {"crop_px": 32 + number}) for number in range(9)]
    ended = [
        TrialOutcome(trial_name(plan.values), None, plan.values, "finished", 1, {"psnr_y": 20.0},
                     number=plan.number)
        for plan in plans
    ]  # fmt: skip
    queue: Any = SimpleNamespace(
        plans={trial_name(plan.values): plan for plan in plans},
        outcomes={each.run_name: each for each in ended},
    )
    assert importances(settings, queue) == {}


@pytest.mark.parametrize("field", ["gan.steps", "psnr.schedule"])
def test_best_yaml_keeps_searched_lengths_and_skipped_stages(field: str, tmp_path: Path) -> None:
    value: Any = {"gan.steps": 30, "psnr.schedule": {"shape": "halving", "milestones": [5]}}[field]
    config = TrainConfig.model_validate({"psnr": {"steps": 40}, "gan": {"steps": 0}})
    settings = TuneConfig.model_validate({"space": {field: {"choice": [value]}}})
    best = TrialOutcome("trial-1", None, {field: value}, "finished", 12, {"psnr_y": 20.0})
    (tmp_path / "best.yaml").write_bytes(best_yaml(config, settings, best))
    loaded = load_config(["--config", str(tmp_path / "best.yaml")], description="", environment={})[0]
    assert loaded.gan.steps == (30 if field == "gan.steps" else 0)
    if field == "psnr.schedule":
        assert loaded.psnr.schedule.milestones == (5,)


def test_the_table_marks_the_first_point_and_what_a_constraint_excludes() -> None:
    space = {"gan.pixel_weight": {"low": 0.0, "high": 1.0}}
    settings = TuneConfig.model_validate({"space": space, "constraints": ["psnr_y >= 20.5"]})
    trials = [outcome(1, psnr_y=20.0), outcome(2, psnr_y=21.0), outcome(3, psnr_y=20.9), outcome(4, "failed")]
    ranking = compare_trials(settings, trials)
    assert [marks(trial, settings, ranking, "trial-1") for trial in trials] == [
        ["tune.points[0]", "constraint not met"], ["best"], [], []
    ]  # fmt: skip


def test_the_summary_names_the_best_and_what_is_not_known() -> None:
    settings = TuneConfig.model_validate({"space": {"gan.pixel_weight": {"low": 0.0, "high": 1.0}}})
    trials = [outcome(1, psnr_y=20.0), outcome(2, psnr_y=21.0), outcome(3, "failed")]
    text = " ".join(summary(settings, trials, compare_trials(settings, trials)))
    assert "3 trials: 2 finished, 1 failed." in text
    assert "The best trial is trial-2: PSNR (Y) 21.000 dB" in text
    assert "not measured" in text
    assert "No trial can be called the best" in " ".join(
        summary(settings, trials[2:], compare_trials(settings, trials[2:]))
    )


def test_the_parent_run_has_the_trials_metrics_once_and_a_link_to_the_best(tmp_path: Path) -> None:
    write_sets(tmp_path)
    storage = str(tmp_path / "runs")
    uri = f"sqlite:///{storage}/mlflow.db"
    config = TrackingConfig(uri=uri, experiment="sweeps")
    parent = open_parent(config, storage, name="sweep", key="key", parameters={})
    for _ in range(2):
        points = [(0, {"psnr_y": 20.0}), (1, {"psnr_y": 21.0})]
        assert log_sweep(parent, points, {"report.html": b"<html>"}, ("trial-1", "abc"))
    client = MlflowClient(uri)
    history = client.get_metric_history(parent.run_id, "trial/psnr_y")
    assert [(point.step, point.value) for point in history] == [(0, 20.0), (1, 21.0)]
    assert [each.path for each in client.list_artifacts(parent.run_id)] == ["report.html"]
    tags = client.get_run(parent.run_id).data.tags
    assert (tags["esrgan.best_trial"], tags["esrgan.best_trial_run_id"]) == ("trial-1", "abc")
    assert "/runs/abc" in tags["mlflow.note.content"]
