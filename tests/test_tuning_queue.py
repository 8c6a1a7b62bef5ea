"""The jobs of a sweep without Ray: stage 1 once, values, early stopping, faults, resuming, repetitions."""

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import job as command_job
from mlflow import MlflowClient
from tiny import write_sets
from tuning_helpers import open_queue, run_all, run_job

from pipeline.config import load_config
from pipeline.run_folder import (
    MLFLOW_RUN,
    OUTCOME,
    RESULT,
    TRIAL_PLAN,
    TrackingDescription,
    TrialOutcome,
    TrialPlan,
)
from pipeline.storage import Storage, only_writer
from pipeline.tracking.pending import send_unsent
from pipeline.training import checkpoint as checkpoints
from pipeline.training import faults
from pipeline.training.run import run_training
from pipeline.training.stopping import STOP
from pipeline.tuning import sweep_folder
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ranking import compare_trials
from pipeline.tuning.space import trial_name
from pipeline.tuning.status import status_lines
from pipeline.tuning.takeaway import crops
from pipeline.tuning.trial import train_job
from pipeline.tuning.trial_queue import TrialQueue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("queue"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A trial sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trial_folder(queue: TrialQueue, name: str) -> Storage:
    return queue.sweep / f"trials/{name}"


def generator_of(run: Storage) -> str:
    result = RESULT.read(run)
    assert result is not None
    return result.generator_sha256


def values_of(queue: TrialQueue) -> dict[str, Any]:
    return {name: (each.status, each.step, each.metrics) for name, each in queue.outcomes.items()}


@pytest.mark.slow
def test_stage_1_is_trained_once_and_a_trial_has_the_bits_of_a_run_alone(
    folder: Path, tmp_path: Path
) -> None:
    scales = (0.1, 0.2, 0.1)
    points = [
        {"model.residual_scale": scale, "gan.adversarial_weight": 1e-3 * (1 + number)}
        for number, scale in enumerate(scales)
    ]
    queue = open_queue(folder, **{"tune.name": "shared", "tune.points": points})
    jobs = run_all(queue)
    assert [job.kind for job in jobs] == ["stage 1", "trial", "stage 1", "trial", "trial"]
    last = jobs[-1]
    # Stage 1's checkpoint is a copy, and its points belong to the shared run.
    assert not last.run.exists("tracking/00000003.jsonl")
    config, _ = load_config(["--config", last.run.path("config.yaml")], description="", environment={})
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{folder}/runs/mlflow.db"})
    alone = config.alone().model_copy(update={"storage": str(tmp_path), "tracking": tracking})
    result = run_training(alone)
    assert result.generator_sha256 == generator_of(last.run)
    assert result.final_metrics == queue.outcomes[last.name].metrics


@pytest.mark.slow
def test_trials_that_search_stage_1_continuously_train_it_themselves(folder: Path) -> None:
    space = {"psnr.learning_rate": {"low": 1e-4, "high": 1e-3}}
    queue = open_queue(folder, **{"tune.name": "own", "tune.space": space, "tune.trials": 1})
    assert [job.kind for job in run_all(queue)] == ["trial"]


@pytest.mark.slow
def test_an_unreadable_shared_checkpoint_is_trained_again(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "unreadable", "tune.trials": 1})
    stage = queue.next()
    assert stage is not None
    run_job(queue, stage)
    (Path(stage.run.uri) / "checkpoints/psnr-00000006/training.safetensors").write_bytes(b"")
    trial = queue.next()
    assert trial is not None
    assert run_job(queue, trial).status == "finished"
    assert "training stage 1 again" in trial.run.read_bytes("log.txt").decode()


@pytest.mark.slow
def test_a_missing_shared_checkpoint_is_trained_again(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "missing", "tune.trials": 1})
    stage = queue.next()
    assert stage is not None
    run_job(queue, stage)
    shutil.rmtree(Path(stage.run.uri) / "checkpoints/psnr-00000006")
    again = queue.next()
    assert again is not None
    assert again.name == stage.name
    run_job(queue, again)
    trial = queue.next()
    assert trial is not None
    assert trial.kind == "trial"


def test_a_stage_1_without_its_last_checkpoint_fails_its_trials(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "no-checkpoint", "tune.trials": 1})
    stage = queue.next()
    assert stage is not None
    queue.ended(stage.name, TrialOutcome(stage.name, None, {}, "finished", 6, {}))
    assert queue.next() is None
    (outcome,) = queue.outcomes.values()
    assert (outcome.status, outcome.retry) == ("failed", True)


def test_trials_do_not_fail_one_after_another_for_a_fault_outside_of_them(folder: Path) -> None:
    space = {"gan.pixel_weight": {"low": 0.1, "high": 1.0}}
    changes = {"tune.name": "outside", "tune.trials": 9, "tune.max_concurrent": 3, "tune.space": space}
    queue = open_queue(folder, **changes)
    stage = queue.next()
    assert stage is not None
    queue.ended(
        stage.name, TrialOutcome(stage.name, None, {}, "failed", 0, {}, "No space left on device", retry=True)
    )
    assert queue.next() is None
    assert len(queue.outcomes) == 2
    assert queue.done
    assert queue.failure == f"{stage.name}: No space left on device"


@pytest.mark.slow
def test_a_trial_of_stage_2_needs_no_stage_1(folder: Path) -> None:
    changes = {"tune.name": "stage-2", "tune.trials": 1, "checkpoint_every_steps": 1}
    first = open_queue(folder, **changes)
    run_all(first, lambda name, step: step == 9 and first.stop())
    shutil.rmtree(Path(first.sweep.uri) / "stage1")
    again = open_queue(folder, **changes)
    (job,) = run_all(again)
    assert job.kind == "trial"
    assert again.outcomes[job.name].status == "finished"


def test_a_job_whose_process_died_resumes_while_it_makes_progress(folder: Path) -> None:
    queue = open_queue(
        folder, **{"tune.name": "lost", "tune.trials": 1, "psnr.steps": 0, "gan.allow_random_start": True}
    )
    for step in (0, 2, 4, 4):
        job = queue.next()
        assert job is not None
        if step:
            (job.run / f"checkpoints/gan-{step:08d}").write_bytes("manifest.json", b"{}")
        queue.lost(job.name, "killed")
    (outcome,) = queue.outcomes.values()
    assert (outcome.status, outcome.reason, outcome.retry) == ("failed", "killed", True)


@pytest.mark.parametrize("usable", [True, False])
def test_a_process_whose_gpu_is_unusable_ends(
    folder: Path, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(folder, **{"tune.name": f"gpu-{usable}", "tune.trials": 1, "use_gpu": True})
    job = queue.next()
    assert job is not None

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("pipeline.tuning.trial.run_training", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", (lambda: None) if usable else fail)
    if usable:
        assert train_job(job, queue.settings, None, print).status == "failed"
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            train_job(job, queue.settings, None, print)


@pytest.mark.parametrize(("kind", "retry"), [("died", True), ("error", False)])
def test_a_trial_on_ray_train_that_loses_its_workers_too_often_is_not_at_fault(
    folder: Path, kind: Any, retry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(folder, **{"tune.name": f"workers-{kind}", "tune.trials": 1, "workers": 2})
    job = queue.next()
    assert job is not None
    faults.record(job.run, 3, kind, "a worker stopped")

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("11 faults since step 3 without a new checkpoint")

    monkeypatch.setattr("pipeline.tuning.trial.run_training", fail)
    outcome = train_job(job, queue.settings, None, print)
    assert (outcome.status, outcome.retry) == ("failed", retry)


def test_a_trial_that_another_process_trains_is_not_at_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(folder, **{"tune.name": "locked", "tune.trials": 1})
    job = queue.next()
    assert job is not None
    monkeypatch.setattr("pipeline.tuning.trial.LOCK_S", 0.0)
    with only_writer(job.run, ""):
        outcome = train_job(job, queue.settings, None, print)
    assert (outcome.status, outcome.retry) == ("failed", True)
    assert "another process has been training this trial" in outcome.reason


@pytest.mark.parametrize("value", ["last", "best", "mean"])
@pytest.mark.slow
def test_the_value_of_a_trial_is_that_of_its_validations(
    folder: Path, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this rate PSNR falls between the validations, so the last one is not the best.
    changes = {"gan.learning_rate": 3e-2, "tune.trials": 1, "tune.value": value, "tune.mean_validations": 2}
    queue = open_queue(folder, **{"tune.name": f"value-{value}", **changes})
    run_all(queue)
    ((name, outcome),) = queue.outcomes.items()
    history = queue.histories[name]
    assert list(history) == [3, 6]
    if value == "mean":
        job = queue.job(name)
        monkeypatch.setattr("pipeline.tuning.trial.validations", lambda run: {})
        without_records = train_job(job, queue.settings, None, print)
        assert without_records.metrics == history[6]
        mean = sum(metrics["psnr_y"] for metrics in history.values()) / 2
        assert outcome.metrics["psnr_y"] == pytest.approx(mean, rel=1e-12)
        return
    best = max(history, key=lambda step: history[step]["psnr_y"])
    step = 12 if value == "last" else 6 + best
    assert (outcome.step, outcome.metrics) == (step, history[step - 6])
    # The weights that the value was measured on are kept, and evaluate.py measures the same on them.
    checkpoint = trial_folder(queue, name).path(f"checkpoints/gan-{step:08d}")
    out = tmp_path / "evaluation"
    command_job("evaluate")(["--model", checkpoint, "--hr", str(folder / "held_out"), "--out", str(out)])
    mean_of = json.loads((out / "metrics.json").read_text())["mean"]
    assert mean_of["psnr_y"] == pytest.approx(outcome.metrics["psnr_y"], abs=1e-9)


@pytest.mark.slow
def test_a_trial_is_compared_and_shown_on_another_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"validation.sets": {"own": str(folder / "photos")}, "tune.metrics": ["own/psnr_y"]}
    queue = open_queue(folder, **{"tune.name": "other-set", "tune.trials": 1, **changes})
    run_all(queue)
    (outcome,) = queue.outcomes.values()
    assert outcome.metrics["own/psnr_y"] != outcome.metrics["psnr_y"]
    ranking = compare_trials(queue.settings, [outcome])
    assert ranking.candidates[0].means == {"own/psnr_y": outcome.metrics["own/psnr_y"]}
    monkeypatch.setattr("pipeline.training.validation_sets.read_held_out", lambda manifest: [])
    assert list(crops(queue, ranking)) == [f"image{index}.png" for index in range(3)]


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_to_the_values_of_an_undisturbed_one(folder: Path) -> None:
    changes = {"tune.search": "tpe", "tune.trials": 2, "checkpoint_every_steps": 1}
    undisturbed = open_queue(folder, **{"tune.name": "undisturbed", **changes})
    run_all(undisturbed)
    for kind, at in (("stage1", 3), ("trial", 9)):
        first = open_queue(folder, **{"tune.name": "interrupted", **changes})

        def stop(name: str, step: int, queue: TrialQueue = first, kind: str = kind, at: int = at) -> None:
            if name.startswith(kind) and step == at:
                queue.stop()

        run_all(first, stop)
        assert first.outcomes == {}
    again = open_queue(folder, **{"tune.name": "interrupted", **changes})
    jobs = run_all(again)
    assert len(jobs) == len({job.name for job in jobs})
    assert values_of(again) == values_of(undisturbed)
    assert run_all(open_queue(folder, **{"tune.name": "undisturbed", **changes})) == []


@pytest.mark.slow
def test_weak_trials_are_stopped_and_the_rungs_survive_a_resume(folder: Path) -> None:
    changes = {
        "tune.scheduler": "asha", "tune.grace_steps": 3, "tune.reduction_factor": 2, "tune.trials": 3, "gan.steps": 9,
        "gan.learning_rate": 1e-2, "tune.space": {"gan.pixel_weight": {"low": 1e-3, "high": 1.0}},
        "tune.points": [{"gan.pixel_weight": weight} for weight in (1.0, 1e-3, 0.9)],
    }  # fmt: skip
    undisturbed = open_queue(folder, **{"tune.name": "rungs", **changes})
    run_all(undisturbed)
    stopped = [each for each in undisturbed.outcomes.values() if each.status == "stopped"]
    assert stopped
    for outcome in stopped:
        assert (
            outcome.reason
            == f"stopped early: psnr_y {outcome.metrics['psnr_y']:.4f} at step {outcome.step - 6} of 9"
        )
        run = trial_folder(undisturbed, outcome.run_name)
        assert RESULT.read(run) is None
        send_unsent(run, f"sqlite:///{folder}/runs/mlflow.db")
        client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
        points = client.get_metric_history(outcome.run_id, "validation/psnr_y")
        assert {point.step: point.value for point in points if point.step > 6} == {
            6 + step: metrics["psnr_y"] for step, metrics in undisturbed.histories[outcome.run_name].items()
        }

    first = open_queue(folder, **{"tune.name": "rungs-again", **changes})
    run_all(first, lambda name, step: first.outcomes and first.stop())
    assert len(first.outcomes) == 2
    again = open_queue(folder, **{"tune.name": "rungs-again", **changes})
    run_all(again)
    assert values_of(again) == values_of(undisturbed)

    # The driver is killed before the report of a validation at a rung, and the trial's process trains a little longer.
    killed = open_queue(folder, **{"tune.name": "rungs-killed", **changes})
    for _ in ("stage 1", "trial"):
        job = killed.next()
        assert job is not None
        run_job(killed, job)
    weak = killed.next()
    assert weak is not None
    arguments = (weak, killed.settings, None, lambda metrics: STOP.make(weak.run))
    thread = threading.Thread(target=train_job, args=arguments)
    thread.start()
    thread.join()
    resumed = open_queue(folder, **{"tune.name": "rungs-killed", **changes})
    run_all(resumed)
    assert values_of(resumed) == values_of(undisturbed)


@pytest.mark.slow
def test_a_trial_that_diverges_keeps_its_reason_and_is_only_repeated_on_request(folder: Path) -> None:
    changes = {
        "tune.name": "diverging", "faults.max_skipped_steps": 0, "tune.trials": 2,
        "tune.space": {"gan.learning_rate": {"choice": [1e-4, 1e30]}},
    }  # fmt: skip
    queue = open_queue(folder, **changes)
    run_all(queue)
    (failed,) = [each for each in queue.outcomes.values() if each.status == "failed"]
    assert "lower gan.learning_rate" in failed.reason
    assert not failed.retry
    assert "error: " in trial_folder(queue, failed.run_name).read_bytes("log.txt").decode()
    assert run_all(open_queue(folder, **changes)) == []
    assert [job.name for job in run_all(open_queue(folder, retry_failed=True, **changes))] == [
        failed.run_name
    ]


@pytest.mark.slow
def test_a_trial_that_could_not_write_is_resumed_by_the_next_submission(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"tune.name": "full", "tune.trials": 1, "faults.max_failed_saves": 0}
    write, full = checkpoints.write, [True]

    def failing(run: Storage, checkpoint: Any, metadata: Any) -> None:
        if full[0] and checkpoint.name.step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(run, checkpoint, metadata)

    monkeypatch.setattr("pipeline.training.checkpointer.write", failing)
    queue = open_queue(folder, **changes)
    run_all(queue)
    (failed,) = queue.outcomes.values()
    assert (failed.status, failed.retry, failed.step) == ("failed", True, 9)
    assert "No space left" in failed.reason
    full[0] = False
    again = open_queue(folder, **changes)
    assert [job.name for job in run_all(again)] == [failed.run_name]
    (outcome,) = again.outcomes.values()
    assert outcome.status == "finished"


@pytest.mark.slow
def test_a_stage_1_that_fails_fails_its_trials_with_its_reason(folder: Path) -> None:
    changes = {
        "tune.name": "no-stage-1",
        "psnr.learning_rate": 1e30,
        "faults.max_skipped_steps": 0,
        "tune.trials": 2,
    }
    queue = open_queue(folder, **changes, **{"tune.space": {"gan.pixel_weight": {"low": 0.1, "high": 1.0}}})
    assert [job.kind for job in run_all(queue)] == ["stage 1"]
    assert len(queue.outcomes) == 2
    for outcome in queue.outcomes.values():
        assert outcome.status == "failed"
        assert outcome.reason.startswith("stage1-")
        assert "lower psnr.learning_rate" in outcome.reason


@pytest.mark.slow
def test_the_best_trials_are_repeated_with_other_seeds(folder: Path) -> None:
    changes = {"tune.name": "repeated", "tune.trials": 2, "tune.repeats": 2, "tune.repeat_top": 1}
    queue = open_queue(folder, **changes)
    run_all(queue)
    repeated = [each for each in queue.outcomes.values() if each.repeats]
    assert [each.values["seed"] for each in repeated] == [6, 7]
    assert len({each.metrics["psnr_y"] for each in repeated}) == 2
    assert {each.repeats for each in repeated} <= {
        each.run_name for each in queue.outcomes.values() if not each.repeats
    }


@pytest.mark.slow
def test_trials_may_be_added_and_foreign_files_are_ignored(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "more", "tune.trials": 1})
    run_all(queue)
    root = Path(queue.sweep.uri)
    (root / "notes.txt").write_text("mine")
    (root / "trials" / "notes").mkdir()
    (root / "outcomes" / "notes.json").write_text("{}")
    for name in ("trials", "stage1", "outcomes"):
        (root / name / ".DS_Store").write_bytes(b"\0")
    (root / "trials" / "trial-partial").mkdir()
    (root / "trials" / "trial-partial" / "trial.json").write_text('{"number": 7')
    # Of another sweep, and a copy of a trial's folder.
    TRIAL_PLAN.at(name=trial_name({"crop_px": 32})).write(queue.sweep, TrialPlan(9, {"crop_px": 32}))
    ((name, plan),) = queue.plans.items()
    TRIAL_PLAN.at(name=f"{name}-copy").write(queue.sweep, plan)
    more = open_queue(folder, **{"tune.name": "more", "tune.trials": 2})
    assert sum(job.kind == "trial" for job in run_all(more)) == 1
    assert set(queue.outcomes) < set(more.outcomes)
    assert [plan.number for plan in more.plans.values()] == [0, 1]
    (root / "trials" / name / "trial.json").write_text("{")
    lost = open_queue(folder, **{"tune.name": "more", "tune.trials": 3, "tune.max_concurrent": 2})
    lost.next()
    assert sorted(plan.number for plan in lost.plans.values()) == [1, 2, 3]


def test_the_tracked_run_of_a_trial_is_known_if_it_was_opened_after_training(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    MLFLOW_RUN.write(run, TrackingDescription("sweeps", "sqlite:///x", "trial-1", {}, {}, "", run_id="abc"))
    assert sweep_folder.tracking_run_id(run) == "abc"


def test_an_invalid_plan_of_an_earlier_version_fails_and_the_sweep_continues(folder: Path) -> None:
    changes = {"tune.name": "invalid", "tune.trials": 2, "tune.space": {"crop_px": {"low": 32, "high": 64}}}
    first = open_queue(folder, **changes)
    values = {"crop_px": 33.5}
    TRIAL_PLAN.at(name=trial_name(values)).write(first.sweep, TrialPlan(0, values))
    queue = open_queue(folder, **changes)
    assert queue.next() is not None
    (failed,) = queue.outcomes.values()
    assert (failed.status, failed.number) == ("failed", 0)
    assert "crop_px" in failed.reason


def test_stage_1_has_a_name_where_the_project_is_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    queue = open_queue(folder, **{"tune.name": "uninstalled", "tune.trials": 1})
    monkeypatch.setattr(metadata, "version", version)
    job = queue.next()
    assert job is not None
    assert job.kind == "stage 1"


def test_the_status_has_a_line_for_each_running_job_and_the_time_left(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "status", "tune.trials": 2, "tune.max_concurrent": 2})
    assert status_lines(queue, 60.0) == ["0 of 2 trials ended"]
    stage = queue.next()
    assert stage is not None
    queue.validated(stage.name, 3, {"psnr_y": 20.0})
    text, line = status_lines(queue, 60.0)
    # 3 steps a minute: 3 of stage 1 and 6 of each trial are left.
    assert text == "0 of 2 trials ended; about 5 min left"
    assert line == f"  {stage.name}  step 3/6"


def test_outcomes_and_plans_read_back(tmp_path: Path) -> None:
    sweep = Storage(str(tmp_path))
    outcome = TrialOutcome(
        "trial-1",
        "id",
        {"gan.pixel_weight": 0.1, "kind": "a"},
        "failed",
        3,
        {"psnr_y": 20.0},
        "why",
        2,
        "",
        1.5,
        True,
    )
    OUTCOME.at(name=outcome.run_name).write(sweep, outcome)
    assert sweep_folder.outcomes(sweep) == [outcome]
    plan = TrialPlan(2, {"perceptual.layers": {"conv1_1": 1.0}, "x": None})
    name = trial_name(plan.values)
    TRIAL_PLAN.at(name=name).write(sweep, plan)
    settings = TuneConfig.model_validate({"space": {key: {"choice": [1]} for key in plan.values}})
    assert sweep_folder.plans(sweep, settings) == [plan]
    assert TRIAL_PLAN.at(name=name).read(sweep) == plan
