"""A whole run in this process: both stages, exact resume after a kill, one line for each mistake."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import exit_code
from mlflow import MlflowClient
from tiny import command, fields, flags, run_until, train, write_sets
from tracking_helpers import new_database

from pipeline.config import load_config
from pipeline.data.feed import Feed
from pipeline.errors import UserError
from pipeline.run_folder import TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.spool import Metrics, read_segment, segment_steps
from pipeline.training import checkpoint as checkpoints
from pipeline.training import loop
from pipeline.training.state import new_state
from pipeline.training.validation_sets import open_sets
from pipeline.training.worker import Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> TrainingResult:
    return train(folder, **{"tracking.register_model": True})


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def curve(run: Storage) -> list[tuple[int, dict[str, float]]]:
    """Every recorded point but rates, memory and waiting."""
    points = []
    for step in segment_steps(run):
        for record in read_segment(run, step).records:
            if isinstance(record, Metrics):
                kept = {
                    key: value
                    for key, value in record.values.items()
                    if key.startswith(("loss", "validation"))
                }
                points.append((record.step, kept))
    return points


def test_both_stages_run_and_write_their_files(folder: Path, undisturbed: TrainingResult) -> None:
    run = Storage(str(folder / "runs" / "tiny"))
    assert (undisturbed.stage, undisturbed.step) == ("gan", 12)
    assert json.loads(run.read_bytes("result.json"))["generator_sha256"] == undisturbed.generator_sha256
    names = [str(name) for name in checkpoints.listed(run)]
    assert "psnr-00000006" in names
    assert names[-1] == "gan-00000012"
    assert undisturbed.model_version == 1
    assert set(undisturbed.metrics) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    assert [step for step, values in curve(run) if any(key.startswith("loss") for key in values)] == list(
        range(1, 13)
    )


def test_a_run_records_and_prints_the_images_of_the_manifest_and_not_what_the_configuration_names(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"data.source": "sample", "data.held_out": "elsewhere", "data.license": "CC0 of sample"}
    result = train(folder, run_name="own", **other, **{"tracking.register_model": True})
    printed = capsys.readouterr().out
    images = "3 images: image0.png ... image2.png"
    assert (
        f"data:    {folder / 'data'}: 12 patches of 64 px from {images}; validation on 2 images: " in printed
    )
    assert "steps:   6 (psnr), then 6 (gan), of 4 crops of 32 px" in printed
    assert "devices: this process, without Ray Train; CPU" in printed
    run = folder / "runs" / "own"
    recorded = json.loads((run / "tracking" / "mlflow.json").read_text())["parameters"]
    assert recorded["data.source"] == images
    assert recorded["data.held_out"] == "2 images: image0.png image1.png"
    assert "data.license" not in recorded
    assert "sample" not in (run / "config.yaml").read_text()
    description = (
        MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
        .get_model_version("esrgan-x4", str(result.model_version))
        .description
    )
    assert f"- data: `{images}`" in description


def test_a_finished_run_is_logged_and_not_modified(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(folder) == undisturbed
    assert "has finished at step 12; nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", ["step 5/12", "step 6 validation", "step 11/12"])
def test_killed_anywhere_and_resumed_ends_with_the_same_bits_and_curve(
    folder: Path, undisturbed: TrainingResult, line: str
) -> None:
    name = "killed-" + line.replace(" ", "-").replace("/", "-")
    changes = {"run_name": name, "tracking.uri": "none"}
    arguments = command("train_gan", folder, fields(folder, **changes))
    run_until(arguments, line, environment())
    run = Storage(str(folder / "runs" / name))
    assert not run.exists("result.json")
    result = train(folder, **changes)
    assert result.generator_sha256 == undisturbed.generator_sha256
    assert result.metrics == undisturbed.metrics
    assert curve(run) == curve(Storage(str(folder / "runs" / "tiny")))


def test_weights_that_never_improve_are_registered_all_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"run_name": "still", "psnr.learning_rate": 1e-30, "psnr.steps": 3, "gan.steps": 0}
    uri = new_database(tmp_path)
    result = train(folder, **changes, **{"tracking.register_model": True, "tracking.uri": uri})
    assert result.model_version == 1
    assert "cannot be read" not in capsys.readouterr().out


def test_reports_and_checkpoints_after_a_resume_hold_what_a_validation_measured(
    folder: Path, undisturbed: TrainingResult, tmp_path: Path
) -> None:
    changes = {"checkpoint_every_steps": 1, "validate_every_steps": 5, "psnr.steps": 12, "gan.steps": 0}
    values = fields(folder, **changes)
    config, _ = load_config(flags(values), description="", environment={})
    run = Storage(str(tmp_path))
    reports: list[dict[str, float]] = []

    def attempt(steps: int) -> None:
        """Trains `steps` steps from the newest checkpoint, saves and ends."""
        intervals = iter(range(1, steps + 1))
        worker = Worker(
            report=lambda metrics: reports.append(dict(metrics)),
            stopping=lambda: next(intervals) == steps,
        )
        feed = Feed(config.data.root, config.seed, config.batch_size, config.crop_px, rank=0, world_size=1)
        loop.train(config, worker, run, feed, open_sets(config, []))

    def saved() -> dict[int, dict[str, float]]:
        newest = checkpoints.newest(run)
        assert newest is not None
        return {newest.scalars["metrics_step"]: newest.scalars["metrics"]}

    attempt(7)
    at_five = saved()
    assert set(at_five) == {5}
    attempt(2)
    assert checkpoints.listed(run)[-1].step == 9
    assert saved() == at_five
    attempt(3)
    assert [report["step"] for report in reports] == [5, 10, 12]
    assert all("psnr_y" in report for report in reports)
    assert saved() == {12: {name: value for name, value in reports[-1].items() if name != "step"}}


def test_a_worker_group_saves_before_it_is_resized(
    folder: Path, undisturbed: TrainingResult, tmp_path: Path
) -> None:
    rare = {"checkpoint_every_steps": 1000, "validate_every_steps": 1000, "psnr.steps": 8, "gan.steps": 0}
    config, _ = load_config(flags(fields(folder, **rare)), description="", environment={})
    run = Storage(str(tmp_path))
    intervals = iter(range(1, 9))
    written: list[int] = []
    worker = Worker(
        resizing=lambda: next(intervals) == 4,
        ready_to_resize=lambda: written.append(checkpoints.listed(run)[-1].step),
    )
    feed = Feed(config.data.root, config.seed, config.batch_size, config.crop_px, rank=0, world_size=1)
    loop.train(config, worker, run, feed, open_sets(config, []))
    assert written == [4]


def test_the_result_holds_the_final_validation_and_that_of_the_best(folder: Path) -> None:
    result = train(folder, run_name="overshoots", **{"gan.learning_rate": 1e-2})
    run = Storage(str(folder / "runs" / "overshoots"))
    measured = {
        step: values["validation/psnr_y"] for step, values in curve(run) if "validation/psnr_y" in values
    }
    assert result.step == max(measured)
    assert result.final_metrics["psnr_y"] == measured[result.step]
    assert result.metrics["psnr_y"] == max(measured.values()) > measured[result.step]


def test_another_configuration_under_the_same_name_is_refused(
    folder: Path, undisturbed: TrainingResult
) -> None:
    with pytest.raises(UserError) as caught:
        train(folder, **{"gan.pixel_weight": 0.5})
    assert "run_name=tiny is in use with another configuration (gan.pixel_weight was 0.01, now 0.5)" in str(
        caught.value
    )


def unfinished(folder: Path, name: str, *without: str) -> Storage:
    """A copy of the undisturbed run as it was before its end, and without these checkpoints."""
    run = folder / "runs" / name
    shutil.copytree(folder / "runs" / "tiny", run)
    (run / "result.json").unlink()
    for checkpoint in without:
        shutil.rmtree(run / "checkpoints" / checkpoint)
    return Storage(str(run))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("corruption", ["flipped", "missing"])
def test_stage_two_resumes_without_the_checkpoint_of_stage_one(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str], corruption: str
) -> None:
    run = unfinished(folder, f"one-{corruption}", "gan-00000012")
    first = Path(run.path("checkpoints/psnr-00000006"))
    shutil.rmtree(first) if corruption == "missing" else flip_a_bit(first / "training.safetensors")
    result = train(folder, run_name=f"one-{corruption}", validate_every_steps=1)
    assert result.generator_sha256 == undisturbed.generator_sha256
    assert capsys.readouterr().out.count("validation images omit the stage-1 output") == 1


def test_a_corrupt_final_checkpoint_is_trained_again(folder: Path, undisturbed: TrainingResult) -> None:
    run = unfinished(folder, "last")
    flip_a_bit(Path(run.path("checkpoints/gan-00000012/training.safetensors")))
    assert train(folder, run_name="last").generator_sha256 == undisturbed.generator_sha256


def test_the_best_by_another_metric_does_not_count(folder: Path, undisturbed: TrainingResult) -> None:
    run = unfinished(folder, "metric", "gan-00000012")
    train(folder, run_name="metric", **{"gan.select_by": "ssim_y"})
    final = checkpoints.newest(run)
    assert final is not None
    assert [best["metric"] for best in final.scalars["best"]] == ["ssim_y"]


def test_keep_best_checkpoints_keeps_the_n_best(folder: Path, undisturbed: TrainingResult) -> None:
    changes = {"psnr.steps": 12, "gan.steps": 0, "validate_every_steps": 2}
    train(folder, run_name="bests", keep_checkpoints=1, keep_best_checkpoints=3, **changes)
    run = Storage(str(folder / "runs" / "bests"))
    final = checkpoints.newest(run)
    assert final is not None
    bests = [best["step"] for best in final.scalars["best"]]
    assert len(bests) == 3
    assert {name.step for name in checkpoints.listed(run)} == {*bests, 12}


def test_an_accepted_change_becomes_the_runs_identity(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(folder, "longer")
    changes = {"run_name": "longer", "gan.steps": 8, "gan.learning_rate": 5e-5}
    with pytest.raises(UserError, match=r"gan\.steps was 6, now 8.*--accept-changes"):
        train(folder, **changes)
    assert train(folder, accept_changes=True, **changes).step == 14
    assert (
        "resuming with changes: gan.learning_rate was 0.0001, now 5e-05; gan.steps" in capsys.readouterr().out
    )
    assert train(folder, **changes).step == 14
    with pytest.raises(UserError, match="already at step 14"):
        train(folder, accept_changes=True, **{**changes, "gan.steps": 2})
    with pytest.raises(UserError, match="stage 2 of run_name=longer began after 6 steps"):
        train(folder, accept_changes=True, **{**changes, "psnr.steps": 8})
    identity = json.loads(run.read_bytes("run.json"))
    run.write_bytes("run.json", json.dumps({**identity, "versions": {"torch": "1.0"}}).encode())
    run.remove("result.json")
    with pytest.raises(UserError, match=r"torch was '1\.0', now"):
        train(folder, **changes)


def test_a_change_that_the_checkpoints_cannot_take_is_refused_and_not_kept(
    folder: Path, undisturbed: TrainingResult
) -> None:
    run = unfinished(folder, "sizes", "gan-00000012")
    before = run.read_bytes("run.json")
    with pytest.raises(UserError, match=r"conv_first\.weight has the shape"):
        train(folder, accept_changes=True, run_name="sizes", **{"model.num_feat": 16})
    for checkpoint in ("gan-00000010", "gan-00000009"):
        run.remove(f"checkpoints/{checkpoint}")
    with pytest.raises(UserError, match="is already at step 6"):
        train(folder, accept_changes=True, run_name="sizes", **{"psnr.steps": 5})
    assert run.read_bytes("run.json") == before
    assert train(folder, run_name="sizes").generator_sha256 == undisturbed.generator_sha256


def test_a_run_that_has_ended_needs_neither_its_checkpoints_nor_its_torch(
    folder: Path, undisturbed: TrainingResult
) -> None:
    run = folder / "runs" / "pruned"
    shutil.copytree(folder / "runs" / "tiny", run)
    shutil.rmtree(run / "checkpoints")
    identity = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps({**identity, "versions": {"torch": "1.0"}}))
    assert train(folder, run_name="pruned") == undisturbed
    with pytest.raises(UserError, match="seed was 5, now 77"):
        train(folder, run_name="pruned", seed=77)
    with pytest.raises(UserError, match="has no checkpoints"):
        train(folder, accept_changes=True, run_name="pruned", **{"gan.steps": 8})


def test_a_run_without_a_checkpoint_may_be_changed(folder: Path, undisturbed: TrainingResult) -> None:
    run = Storage(str(folder / "runs" / "fresh"))
    identity = json.loads((folder / "runs" / "tiny" / "run.json").read_bytes())
    run.write_bytes(
        "run.json", json.dumps({**identity, "fields": {**identity["fields"], "seed": 99}}).encode()
    )
    assert train(folder, run_name="fresh").generator_sha256 == undisturbed.generator_sha256
    assert json.loads(run.read_bytes("run.json"))["key"] != identity["key"]


def test_skipped_steps_are_logged(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"gan.perceptual_weight": 1e38, "faults.max_skipped_steps": 100, "log_every_steps": 2}
    train(folder, run_name="skips", **changes)
    assert "warning: skipped 2 optimizer steps (non-finite gradients)" in capsys.readouterr().out


def test_corrupt_patches_are_replaced_up_to_a_share(
    folder: Path, undisturbed: TrainingResult, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "data", folder / "worn")
    (shard,) = (folder / "worn").glob("patches-*.parquet")
    content = bytearray(shard.read_bytes())
    content[500:12000] = bytes(byte ^ 1 for byte in content[500:12000])  # most of the first of 12 patches
    shard.write_bytes(content)
    changes = {"data.root": str(folder / "worn"), "data.max_corrupt_share": 1}
    assert train(folder, run_name="worn", **changes).step == 12
    assert " corrupt patches" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"corrupt patches so far.*data\.max_corrupt_share=0"):
        train(folder, run_name="worn-out", **{**changes, "data.max_corrupt_share": 0})


def test_weights_that_are_not_finite_end_the_run_with_advice(
    folder: Path, undisturbed: TrainingResult
) -> None:
    with pytest.raises(UserError, match=r"holds a non-finite value; not written; lower psnr\.learning_rate"):
        train(folder, run_name="huge", **{"psnr.learning_rate": 1e39})


def test_fields_select_the_losses_of_both_stages(folder: Path, undisturbed: TrainingResult) -> None:
    stage = {"pixel_loss": "charbonnier", "ms_ssim_weight": 0.1}
    changes = {f"{name}.{field}": value for name in ("psnr", "gan") for field, value in stage.items()}
    train(folder, run_name="losses", **changes, **{"gan.loss": "vanilla"})
    runs = Storage(str(folder / "runs"))
    default, found = (
        {step: values for step, values in curve(runs / name) if "loss/pixel" in values}
        for name in ("tiny", "losses")
    )
    assert all(0 < found[step]["loss/ms_ssim"] < 1 for step in range(1, 13))
    assert not any("loss/ms_ssim" in values for values in default.values())
    # The first step has the same weights and images: sqrt(d^2 + 0.001^2) is a little more than |d|.
    assert 0 < found[1]["loss/pixel"] - default[1]["loss/pixel"] < 1e-3
    # A new discriminator's logits are about 0: the vanilla loss is the sum of two terms of log 2.
    assert found[7]["loss/discriminator"] == pytest.approx(2 * math.log(2), abs=0.3)
    assert default[7]["loss/discriminator"] == pytest.approx(math.log(2), abs=0.3)


def test_the_discriminator_learns_at_the_rate_of_its_field(folder: Path) -> None:
    changes = {"gan.discriminator_learning_rate": 1e-9, "gan.learning_rate": 1e-3}
    train(folder, run_name="slow", **changes)
    config, _ = load_config(flags(fields(folder, **changes)), description="", environment={})
    newest = checkpoints.newest(Storage(str(folder / "runs" / "slow")))
    assert newest is not None
    first = new_state(config.alone(), "gan", torch.device("cpu")).tensors()
    names = [name for name in first if name.startswith("discriminator.") and name.endswith("weight")]
    assert names
    for name in names:
        # Six steps of at most 1e-9, of which float32 keeps nothing in most weights.
        torch.testing.assert_close(newest.tensors[name], first[name], rtol=0, atol=1e-7)
    assert newest.tensors["discriminator_optimizer." + names[0].removeprefix("discriminator.") + ".step"] == 6


def test_a_gan_without_perceptual_loss_needs_no_perceptual_weights(
    folder: Path, undisturbed: TrainingResult
) -> None:
    changes = {"psnr.steps": 1, "gan.steps": 1, "gan.perceptual_weight": 0}
    assert train(folder, run_name="plain", **{"perceptual.weights": "/no/weights.pth"}, **changes).step == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_found_before_the_start(folder: Path) -> None:
    with pytest.raises(UserError, match="use_gpu=true: torch cannot use a GPU here"):
        train(folder, run_name="gpu", use_gpu=True)
    assert not (folder / "runs" / "gpu").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "/no/such/folder", "data.root": "new"}, "data.source=/no/such/folder"),
        ({"data.source": "empty", "data.root": "new"}, "no images"),
        ({"storage": "/proc/runs"}, "storage=/proc/runs"),
        ({"perceptual.weights": "/no/weights.pth"}, "/no/weights.pth"),
        ({"perceptual.weights": "empty.pth"}, "empty.pth: not readable as weights"),
        ({"perceptual.layers": {"conv9_9": 1.0}}, "conv9_9"),
        ({"workers": 4096, "batch_size": 4096}, "workers=4096: they need 4096 CPUs"),
        ({"tracking.uri": "http://127.0.0.1:9"}, "tracking.uri=http://127.0.0.1:9"),
        ({"gan.select_by": "beauty"}, "gan.select_by='beauty': should be 'psnr_y', 'ssim_y'"),
        ({"data.patch_px": 128}, "64"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    folder: Path,
    tmp_path: Path,
    undisturbed: TrainingResult,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.pth").touch()
    changes = {
        key: str(tmp_path / value) if value in ("new", "empty", "empty.pth") else value
        for key, value in changes.items()
    } | {"run_name": "mistake"}
    if "data.patch_px" in changes:
        changes["crop_px"] = 128
    _, program, *arguments = command("train_gan", folder, fields(folder, **changes))
    capsys.readouterr()
    assert exit_code(Path(program).stem, *arguments) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_relative_storage_in_a_copied_folder_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="storage=runs: relative to a copy"):
        train(folder, storage="runs")


def test_too_little_space_is_refused_before_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 1000)
    with pytest.raises(UserError, match=r"storage=.*0 MiB free, and checkpoints take about"):
        train(folder, run_name="no-space")


def test_two_processes_cannot_train_the_same_run(folder: Path, undisturbed: TrainingResult) -> None:
    import fcntl

    other = folder / "runs" / "locked"
    other.mkdir()
    with (other / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            train(folder, run_name="locked")
