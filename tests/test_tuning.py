"""Sweeps on Ray Tune: killed and resumed, more trials than CPUs, several workers; what is refused before Ray starts."""

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from evaluation_helpers import job
from mlflow import MlflowClient
from PIL import Image
from ray.tune.search import Searcher
from test_training_ray import hurting
from tiny import write_sets
from tiny_patches import write_patches
from tuning_helpers import configurations, open_queue, run_all, sweep_fields

from pipeline.data import prepare
from pipeline.errors import UserError
from pipeline.model import RRDBNet, VGGFeatures
from pipeline.run_folder import (
    IDENTITY,
    OUTCOME,
    SWEEP,
    RunIdentity,
    SweepIdentity,
    TrialOutcome,
)
from pipeline.storage import Storage, only_writer
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.run import open_parent, open_run, require_tracking
from pipeline.training.stopping import STOP
from pipeline.tuning import sweep_folder
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.figure import as_png, tradeoff_figure
from pipeline.tuning.ranking import compare_trials, in_order
from pipeline.tuning.ray_tune import LOST, JobSearch, Listener, fitting
from pipeline.tuning.result import SweepResult
from pipeline.tuning.sweep import check_trials, conclude, run_sweep, slots_of, trial_base
from pipeline.tuning.sweep_folder import outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sweep"))


def command(folder: Path, **changes: Any) -> list[str]:
    return tiny.command("tune_gan", folder, sweep_fields(folder, **changes))


def environment() -> dict[str, str]:
    # Without RAY_ADDRESS the command starts a private Ray.
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
def test_a_sweep_killed_between_validations_ends_with_the_values_of_an_undisturbed_one(
    ray_cluster: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The validations are at steps 6 and 12. More trials than CPUs wait; their start has no time-out.
    changes = {
        "checkpoint_every_steps": 1, "validate_every_steps": 1000, "tune.max_concurrent": 3, "tune.trials": 3,
        "faults.worker_start_timeout_s": 1,
    }  # fmt: skip
    undisturbed = open_queue(folder, **{"tune.name": "undisturbed", **changes})
    run_all(undisturbed)
    tiny.run_until(command(folder, **changes), "(1/3)", environment())
    sweep = Storage(str(folder / "runs" / "sweep"))
    assert len(outcomes(sweep)) < 3

    result_file = folder / "result.json"
    capfd.readouterr()
    job("tune_gan")([*command(folder, **changes)[2:], "--json", str(result_file)])
    printed = capfd.readouterr().out
    assert "resuming sweep sweep: " in printed
    trials = outcomes(sweep)
    assert {trial.run_name: (trial.status, trial.step, trial.metrics) for trial in trials} == {
        name: ("finished", 12, trial.metrics) for name, trial in undisturbed.outcomes.items()
    }

    result = json.loads(result_file.read_text())
    assert set(result) >= {"run_id", "trials", "best"}
    best = max(trials, key=lambda trial: trial.metrics["psnr_y"])
    assert result["best"]["run_name"] == best.run_name
    assert f"best: {best.run_name}" in printed
    with Image.open(sweep.path("tradeoff.png")) as figure:
        assert figure.width > 300

    tracked = children(folder, result["run_id"])
    assert {trial.run_name for trial in trials} <= set(tracked)
    for trial in trials:
        run = tracked[trial.run_name]
        assert run.info.status == "FINISHED"
        assert float(run.data.params["model.residual_scale"]) == trial.values["model.residual_scale"]
        assert run.data.metrics["validation/psnr_y"] == pytest.approx(trial.metrics["psnr_y"])
    parent = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_run(result["run_id"])
    assert parent.data.tags["esrgan.best_trial"] == best.run_name
    assert "trial/psnr_y" in parent.data.metrics


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_whose_process_is_killed_ends_with_the_value_of_an_undisturbed_one(
    ray_cluster: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"checkpoint_every_steps": 1, "validate_every_steps": 1000, "tune.trials": 1, "gan.steps": 100}
    undisturbed = open_queue(folder, **{"tune.name": "not-killed", **changes})
    run_all(undisturbed)
    (expected,) = undisturbed.outcomes.values()
    trial = Storage(str(folder / "runs" / "killed" / "trials" / expected.run_name))
    with hurting(trial, 6, ("ImplicitFunc.train", signal.SIGKILL)):
        (outcome,) = run_sweep(*configurations(folder, **{"tune.name": "killed", **changes})).trials
    assert f"{expected.run_name}: its process ended; starting another" in capfd.readouterr().out
    assert (outcome.status, outcome.metrics) == ("finished", expected.metrics)


def sweep_on_ray_train(folder: Path, name: str) -> TrialOutcome:
    """The only trial of a sweep whose trials have two workers."""
    changes = {
        "workers": 2,
        "tune.trials": 1,
        "tune.max_concurrent": 2,
        "psnr.steps": 0,
        "gan.steps": 60,
        "gan.allow_random_start": True,
        "checkpoint_every_steps": 2,
    }
    (trial,) = run_sweep(*configurations(folder, **{"tune.name": name, **changes})).trials
    return trial


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_on_ray_train_ends_with_the_same_values_after_kills(
    ray_cluster: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = sweep_on_ray_train(folder, "workers")
    assert (undisturbed.status, undisturbed.step) == ("finished", 60)
    assert "tune.max_concurrent=2: 1 at a time" in capfd.readouterr().out
    run = Storage(str(folder / "runs" / "disturbed" / "trials" / undisturbed.run_name))
    with hurting(run, 0, ("RayTrainWorker", signal.SIGKILL), ("TrainController", signal.SIGKILL)):
        trial = sweep_on_ray_train(folder, "disturbed")
    assert (trial.status, trial.step, trial.metrics) == ("finished", 60, undisturbed.metrics)
    log = run.read_bytes("log.txt").decode()  # what the driver, its controllers and its workers print
    for text in ("[gan] step 60/60", "resuming at step", "; starting", "; resuming"):
        assert text in log


def test_as_many_trials_run_at_a_time_as_fit_into_the_nodes(folder: Path) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]

    def fits(**changes: Any) -> int:
        return fitting(configurations(folder, **changes)[0], nodes)

    assert fits(workers=1) == 11
    assert fits(workers=2) == 5
    assert fits(workers=2, cpus_per_worker=2) == 2
    assert fits(workers=1, use_gpu=True) == 2
    assert fits(workers=[1, 4]) == 11


def test_a_sweep_stops_its_trials_when_its_hours_are_over_or_a_stop_is_requested(folder: Path) -> None:
    for name, hours in (("hours", 1e-12), ("stop", 1e9)):
        queue = open_queue(folder, **{"tune.name": name, "tune.trials": 1, "tune.max_hours": hours})
        job = queue.next()
        assert job is not None
        listener = Listener(queue, poll_s=0.0)
        if name == "stop":
            listener.on_step_end(0, [])
            assert not queue.stopping
            STOP.make(queue.sweep)
        listener.on_step_end(0, [])
        assert queue.stopping
        assert STOP.is_open(job.run)
        assert queue.next() is None


def test_a_sweep_whose_folder_cannot_be_written_stops_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(folder, **{"tune.name": "full-disk", "psnr.steps": 0, "gan.allow_random_start": True})
    job = queue.next()
    assert job is not None

    def full(storage: Storage, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "write_bytes", full)
    listener = Listener(queue, poll_s=0.0)
    ended = OUTCOME.dump(TrialOutcome(job.name, None, {}, "finished", 6, {"psnr_y": 20.0})).decode()
    listener.on_trial_complete(
        0, [], SimpleNamespace(config={"name": job.name}, last_result={"outcome": ended})
    )
    assert "No space left" in str(listener.failure)
    assert queue.done
    assert queue.outcomes == {}  # the next submission reads the result from the trial's folder


def test_a_sweep_that_cannot_write_what_it_proposes_stops_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(folder, **{"tune.name": "full-disk-2"})

    def full(storage: Storage, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "write_bytes", full)
    listener = Listener(queue)
    assert JobSearch(queue, listener).suggest("1") == Searcher.FINISHED
    assert "No space left" in str(listener.failure)


def test_a_job_that_ray_tune_ends_without_a_callback_starts_again(folder: Path) -> None:
    queue = open_queue(folder, **{"tune.name": "left", "tune.trials": 1})
    job = queue.next()
    assert job is not None
    listener = Listener(queue, poll_s=0.0)

    def trials(*statuses: str) -> list[Any]:
        return [SimpleNamespace(config={"name": job.name}, status=status) for status in statuses]

    listener.on_step_end(0, trials("RUNNING"))
    listener.on_step_end(0, trials("ERROR", "PENDING"))
    assert set(queue.running) == {job.name}
    listener.on_step_end(0, trials("ERROR", "ERROR"))
    assert queue.running == {}
    again = queue.next()
    assert again is not None
    assert again.name == job.name


def test_a_sweep_of_which_no_trial_fits_into_a_node_is_refused(folder: Path) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}] * 4
    config, settings = configurations(
        folder, **{"workers": 1, "cpus_per_worker": 3, "tune.max_concurrent": 2}
    )
    with pytest.raises(UserError, match="cpus_per_worker=3: the cluster's nodes do not have room"):
        slots_of(config.model_copy(update={"workers": 0}), settings, nodes)
    assert slots_of(config.model_copy(update={"cpus_per_worker": 2}), settings, nodes) == 2


def test_the_best_trial_is_kept_before_the_figures_are_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"tune.name": "drawn", "tune.trials": 1, "psnr.steps": 0, "gan.allow_random_start": True}
    queue = open_queue(folder, **changes)
    job = queue.next()
    assert job is not None
    queue.ended(
        job.name, TrialOutcome(job.name, "id", job.plan.values, "finished", 6, {"psnr_y": 20.0}, number=0)
    )

    def broken(*arguments: Any) -> dict[str, bytes]:
        raise RuntimeError("no font")

    monkeypatch.setattr("pipeline.tuning.sweep.sweep_files", broken)
    config, _ = configurations(folder, **changes)
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    parent = open_parent(
        TrackingConfig(uri=uri, experiment="drawn"), config.storage, name="drawn", key="k", parameters={}
    )
    with pytest.raises(RuntimeError, match="no font"):
        conclude(queue, config, parent)
    assert queue.sweep.exists("best.yaml")
    assert MlflowClient(uri).get_run(parent.run_id).data.tags["esrgan.best_trial"] == job.name


def test_a_trial_that_lost_its_process_has_its_status_and_reason_in_mlflow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"tune.name": "lost", "tune.trials": 3, "psnr.steps": 0, "gan.allow_random_start": True}
    queue = open_queue(folder, **changes)
    config, _ = configurations(folder, **changes)
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    tracking = TrackingConfig(uri=uri, experiment="lost")
    parent = open_parent(tracking, config.storage, name="lost", key="k", parameters={})
    for _ in range(2):  # without progress: not restarted again
        job = queue.next()
        assert job is not None
        child = open_run(tracking, job.run, run_name=job.name, parameters={}, tags={}, config_text="")
        assert child is not None
        queue.lost(job.name, LOST)
    other = queue.next()
    assert other is not None
    outcome = TrialOutcome(other.name, "id", other.plan.values, "finished", 6, {"psnr_y": 20.0}, number=1)
    queue.ended(other.name, outcome)
    weak = queue.next()
    assert weak is not None
    stopped = open_run(tracking, weak.run, run_name=weak.name, parameters={}, tags={}, config_text="")
    assert stopped is not None
    early = TrialOutcome(weak.name, None, weak.plan.values, "stopped", 3, {"psnr_y": 19.0}, "early", number=2)
    queue.ended(weak.name, early)
    monkeypatch.setattr("pipeline.tuning.sweep.sweep_files", lambda *arguments: {})
    result = conclude(queue, config, parent)
    reasons = [(trial.status, trial.reason) for trial in result.trials]
    assert reasons == [("finished", ""), ("stopped", "early"), ("failed", LOST)]
    run, ended = (MlflowClient(uri).get_run(each.run_id) for each in (child, stopped))
    assert (run.info.status, run.data.tags["esrgan.failure"]) == ("FAILED", LOST)
    assert ended.info.status == "KILLED"
    assert "esrgan.failure" not in ended.data.tags


def test_a_trial_starts_although_the_tracking_server_has_become_unreachable(folder: Path) -> None:
    config, _ = configurations(folder, **{"tracking.uri": "http://127.0.0.1:1"})
    with pytest.raises(UserError, match="start the server"):
        require_tracking(config.tracking, config.storage)
    base = trial_base(config)
    require_tracking(base.tracking, base.storage)


def test_changed_weights_of_a_searched_field_are_refused(folder: Path, tmp_path: Path) -> None:
    def write(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        state = RRDBNet(8, 1, 4).state_dict()
        weights = {key: torch.rand(value.shape, generator=generator) for key, value in state.items()}
        safetensors.torch.save_file(weights, tmp_path / "generator.safetensors")
        features = VGGFeatures(["conv1_2"], "random", seed=seed).state_dict()
        safetensors.torch.save_file(features, tmp_path / "vgg.safetensors")

    changes = {
        "tune.space": {"init.generator": {"choice": [str(tmp_path / "generator.safetensors"), None]}},
        "perceptual.weights": str(tmp_path / "vgg.safetensors"),
    }
    config, settings = configurations(folder, **changes)
    sweep = Storage(str(tmp_path / "sweep"))

    def claim() -> None:
        weights = check_trials(config, settings, sweep, {})
        sweep_folder.claim(sweep, settings, sweep_folder.identity_of(config, settings, "a", weights=weights))

    write(1)
    claim()
    claim()
    write(2)
    for field in (r"init\.generator=.*generator\.safetensors", r"perceptual\.weights=.*vgg\.safetensors"):
        with pytest.raises(UserError, match=f'{field} was "sha256 .*now "sha256 '):
            claim()


def run(folder: Path, **changes: Any) -> None:
    run_sweep(*configurations(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune.space": {"gan.beauty": {"low": 0.1, "high": 1.0}}}, "gan.beauty"),
        ({"tune.space": {"model.num_block": {"low": 0.5, "high": 2}}}, "give a whole number"),
        ({"tune.space": {"workers": {"choice": [1, 2]}}}, "workers has no effect"),
        ({"tune.metrics": ["beauty"]}, "tune.metrics=beauty"),
        ({"tune.metrics": ["Set5/psnr_y"]}, "tune.metrics=Set5/psnr_y: not measured"),
        ({"tune.constraints": ["beauty >= 1"]}, "tune.constraints=beauty"),
        ({"tune.scheduler": "asha", "tune.grace_steps": 6}, "tune.grace_steps=6: no validation"),
        ({"tune.points": [{"gan.steps": 1}]}, "is not a field of tune.space"),
        ({"tune.repeats": 1, "tune.space": {"seed": {"choice": [1, 2]}}}, "tune.repeats"),
        ({"data.source": "/no/such/folder", "data.root": "/tmp/nowhere"}, "data.source=/no/such/folder"),
        ({"tracking.uri": "none"}, "tracking.uri=none: a sweep needs a tracking server"),
        (
            {"tracking.uri": "http://127.0.0.1:1", "tracking.if_unreachable": "spool"},
            "127.0.0.1:1.*a sweep needs a tracking server",
        ),
    ],
)
def test_invalid_input_is_refused_before_ray_starts(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(folder, **{"tune.name": "invalid", **changes})
    assert "\n" not in str(caught.value)
    assert not (folder / "runs" / "invalid").exists()


def test_a_sweep_named_like_a_file_is_refused_before_ray_starts(folder: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow\.db: not writable"):
        run(folder, **{"tune.name": "mlflow.db"})


def test_an_existing_data_set_that_does_not_fit_the_trials_is_refused_before_ray_starts(
    folder: Path, tmp_path: Path
) -> None:
    changes = {"tune.name": "unfit", "data.root": write_patches(tmp_path, 3, side=48)}
    space = {"crop_px": {"choice": [32, 64]}, "batch_size": {"choice": [4]}}
    with pytest.raises(UserError, match=r"crop_px=64: the patches in .* have 48 pixels"):
        run(folder, **changes, **{"tune.space": space})
    assert not (folder / "runs" / "unfit").exists()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_sweep_without_a_held_out_set_is_refused_before_ray_starts(folder: Path, prepared: bool) -> None:
    changes = {"tune.name": "unmeasured", "data.root": str(folder / f"without-held-out-{prepared}")}
    config, settings = configurations(folder, **changes)
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out": None})})
    if prepared:
        prepare(config.data, on_ray=False)
    with pytest.raises(UserError, match=r"held.out set|data\.held_out: not set") as caught:
        run_sweep(config, settings)
    assert "ranks its trials by psnr_y" in str(caught.value)
    assert not (folder / "runs" / "unmeasured").exists()


def test_a_constraint_on_the_held_out_set_needs_one(folder: Path) -> None:
    changes = {
        "tune.name": "unmeasured", "data.root": str(folder / "unconstrained"), "tune.constraints": ["psnr_y >= 1"],
        "validation.sets": {"own": str(folder / "photos")}, "tune.metrics": ["own/psnr_y"],
    }  # fmt: skip
    config, settings = configurations(folder, **changes)
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out": None})})
    with pytest.raises(UserError, match=r"data\.held_out: not set, and a sweep ranks its trials by psnr_y"):
        run_sweep(config, settings)


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
        run(folder, **{"tune.name": "corrupt", "storage": str(tmp_path)})
    assert "\n" not in str(caught.value)


def test_a_changed_sweep_is_refused_with_both_values(folder: Path, tmp_path: Path) -> None:

    sweep = Storage(str(tmp_path / "sweep"))

    def claim(sha256: str = "a" * 64, **changes: Any) -> None:
        config, settings = configurations(folder, **changes)
        sweep_folder.claim(sweep, settings, sweep_folder.identity_of(config, settings, sha256))

    claim()
    claim(**{"workers": 2, "tune.trials": 99, "tune.max_concurrent": 3, "tune.max_hours": 1})
    for changes, message in [
        ({"seed": 1}, "seed was 5, now 1"),
        ({"tune.metrics": ["ssim_y"]}, r'tune.metrics was \["psnr_y"\], now \["ssim_y"\]'),
        ({"tune.value": "best"}, 'tune.value was "last", now "best"'),
        ({"validate_every_steps": 4}, "validate_every_steps was 3, now 4"),
        ({"sha256": "b" * 64}, 'data set .its manifest. was "aaaaaaaaaaaa", now "bbbbbbbbbbbb"'),
        ({"tune.space": {"gan.pixel_weight": {"low": 0.1, "high": 1.0}}}, r"tune.space was \{.*, now \{"),
    ]:
        with pytest.raises(UserError, match=f"tune.name=sweep is in use .*{message}"):
            claim(**changes)


def test_a_sweep_of_an_earlier_version_has_the_defaults_of_fields_added_since(
    folder: Path, tmp_path: Path
) -> None:
    sweep = Storage(str(tmp_path / "sweep"))
    config, settings = configurations(folder)
    new = sweep_folder.identity_of(config, settings, "a" * 64)
    fields = json.loads(json.dumps(new.fields))
    del fields["gan"]["ms_ssim_weight"], fields["validation"]["weights_folder"]
    SWEEP.write(sweep, SweepIdentity(fields, new.manifest_sha256))
    sweep_folder.check(sweep, settings, new)


def test_one_process_runs_a_sweep_and_folders_of_runs_and_sweeps_are_not_mixed(
    folder: Path, tmp_path: Path
) -> None:
    busy = Storage(str(folder / "runs" / "busy"))
    open_queue(folder, **{"tune.name": "busy"})  # prepares the data set
    with (
        only_writer(busy, ""),
        pytest.raises(UserError, match=r"tune\.name=busy: another process runs this sweep"),
    ):
        run(folder, **{"tune.name": "busy"})
    IDENTITY.write(Storage(str(folder / "runs" / "model")), RunIdentity("key", {}, ""))
    with pytest.raises(UserError, match=r"tune.name=model: .* is the folder of a training run"):
        run(folder, **{"tune.name": "model"})
    (folder / "runs" / "a-sweep").mkdir()
    (folder / "runs" / "a-sweep" / SWEEP.path).write_text("{}")
    with pytest.raises(UserError, match=r"run_name=a-sweep: .* is the folder of a sweep"):
        tiny.train(folder, run_name="a-sweep")


@pytest.mark.parametrize(("metric", "expected"), [("psnr_y", ["b", "a", "c"]), ("lpips", ["a", "b", "c"])])
def test_trials_are_listed_from_the_best(
    metric: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", {metric: 20.0}), ("b", {metric: 21.0}), ("c", {})]
    trials = [TrialOutcome(f"trial-{name}", None, {}, "finished", 3, metrics) for name, metrics in rows]
    repetition = TrialOutcome(
        "trial-e", None, {"seed": 9}, "finished", 3, {metric: 20.5}, number=9, repeats="trial-a"
    )
    failed = TrialOutcome("trial-d", None, {}, "failed", 3, {}, "out of paper")
    settings = TuneConfig.model_validate({"metrics": [metric]})
    ended = in_order([failed, *trials, repetition], compare_trials(settings, trials))
    result = SweepResult(
        "run", ended, trials[0], [], ["trial-a", "trial-b"], {metric: 0.1}, {"trial-a": {metric: 20.25}}, "tradeoff.png"
    )  # fmt: skip
    monkeypatch.setattr("pipeline.tuning.sweep.run_sweep", lambda *arguments: result)
    job("tune_gan")(["--tune.metrics", f'["{metric}"]'])
    printed = capsys.readouterr().out
    listed = [
        line.split()[0] for line in printed.splitlines() if line.startswith("trial-") and ":" not in line
    ]
    assert listed == [f"trial-{name}" for name in [*expected, "d"]]
    assert "  trial-e, seed 9 " in printed.partition("trial-a")[2]
    assert f"trial-a: {metric} 20.2500, mean of 2 seeds" in printed
    assert "trial-d: out of paper" in printed
    assert f"noise (standard deviation between seeds): {metric} 0.1000" in printed
    assert "the differences between trial-a, trial-b are within the noise" in printed


def test_the_figure_has_a_panel_for_each_field_and_metric() -> None:
    def trial(number: int, status: str, metrics: dict[str, float], **values: Any) -> TrialOutcome:
        named = {f"gan.{name}": value for name, value in values.items()}
        return TrialOutcome(f"trial-{number}", None, named, status, 3, metrics, number=number)

    trials = [
        trial(1, "finished", {"psnr_y": 20.0, "ssim_y": 0.5}, rate=0.001, kind=None),
        trial(2, "stopped", {"psnr_y": 19.0, "ssim_y": 0.5}, rate=0.1, kind=[1]),
        trial(3, "failed", {}, rate=0.2, kind="b"),
    ]
    space = {"gan.rate": {"low": 0.001, "high": 1.0, "log": True}, "gan.kind": {"choice": [None, [1], "b"]}}
    settings = TuneConfig.model_validate({"space": space, "metrics": ["psnr_y", "ssim_y"]})
    figure = tradeoff_figure(trials, settings, compare_trials(settings, trials))
    assert len(figure.axes) == 4
    with Image.open(io.BytesIO(as_png(figure))) as image:
        assert image.width == pytest.approx(2 * 3.2 * 110, abs=2)
