"""Whole runs that start from given weights: exact metrics, exact resume, provenance, other sizes and scales."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import job, load_generator
from mlflow import MlflowClient
from test_training_run import curve, environment
from tiny import command, fields, flags, run_until, train, write_photos, write_sets

from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.model import RRDBNet, generator_sha256, seeded
from pipeline.run_folder import IDENTITY, TrainingResult
from pipeline.storage import Storage
from pipeline.tracking.lookup import pull_generator
from pipeline.tuning.sweep import run_sweep

pytestmark = pytest.mark.slow
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def stage_one(folder: Path) -> TrainingResult:
    """A registered generator after 40 steps of stage 1."""
    changes = {"psnr.steps": 40, "psnr.learning_rate": 2e-3, "gan.steps": 0, "validate_every_steps": 40}
    return train(folder, run_name="one", **changes, **{"tracking.register_model": True})


def published(path: Path) -> str:
    """Weights with 6 blocks in the layout of the published x4plus-anime file, which has no metadata."""
    generator = seeded(3, lambda: RRDBNet(8, 6, 4))
    torch.save({"params_ema": generator.state_dict()}, path)
    return str(path)


def at_step_zero(run: Storage) -> dict[str, float]:
    return next(
        {name.removeprefix("validation/"): value for name, value in values.items()}
        for step, values in curve(run)
        if step == 0 and values
    )


def evaluated(folder: Path, model: str, out: Path) -> dict[str, float]:
    arguments = ["--model", model, "--hr", str(folder / "held_out"), "--out", str(out)]
    job("evaluate")(arguments)
    mean: dict[str, float] = json.loads((out / "metrics.json").read_text())["mean"]
    return mean


def test_fine_tuning_begins_with_evaluates_metrics_and_resumes_exactly_without_the_file(
    folder: Path, tmp_path: Path
) -> None:
    source = published(tmp_path / "published.pth")
    expected = evaluated(folder, source, tmp_path / "out")
    changes = {"init.generator": source, "init.adopt_sizes": True, "tracking.uri": "none"}
    undisturbed = train(folder, run_name="whole", **changes)
    run = Storage(str(folder / "runs" / "whole"))
    first = at_step_zero(run)
    assert {name: first[name] for name in METRICS} == pytest.approx(
        {name: expected[name] for name in METRICS}, abs=1e-6
    )
    for name, line in (("early", "step 1/12"), ("later", "step 5/12"), ("gan", "step 9/12")):
        again = published(tmp_path / f"{name}.pth")
        changes = {**changes, "run_name": name, "init.generator": again}
        run_until(command("train_gan", folder, fields(folder, **changes)), line, environment())
        Path(again).unlink()
        result = train(folder, **changes)
        assert result.generator_sha256 == undisturbed.generator_sha256
        assert curve(Storage(str(folder / "runs" / name))) == curve(run)


def test_the_origin_is_recorded_in_the_run_in_mlflow_and_in_the_card(
    folder: Path, stage_one: TrainingResult
) -> None:
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    source = f"models:/esrgan-x4/{stage_one.model_version}"
    result = train(
        folder, run_name="registered", **{"init.generator": source, "tracking.register_model": True}
    )
    digest = generator_sha256(load_generator(pull_generator(source, uri))[0].state_dict())
    identity = IDENTITY.read(Storage(str(folder / "runs" / "registered")))
    assert identity is not None
    origin = identity.initial["generator"]
    assert (origin.sha256, origin.version, origin.run_id) == (digest, source, stage_one.run_id)
    client = MlflowClient(uri, uri)
    version = client.get_model_version("esrgan-x4", str(result.model_version))
    run = client.get_run(str(result.run_id))
    assert run.data.params["init.generator"] == source
    assert run.data.params["init.generator_sha256"] == digest
    assert run.data.tags["esrgan.init.generator"] == digest
    assert run.data.tags["esrgan.init.generator.version"] == source
    assert run.data.tags["esrgan.init.generator.run_id"] == stage_one.run_id
    (parent,) = client.get_run(str(stage_one.run_id)).outputs.model_outputs
    assert [model.model_id for model in run.inputs.model_inputs] == [parent.model_id]
    assert f"- initial_generator: `{source}`" in version.description
    assert f"- initial_generator_sha256: `{digest}`" in version.description
    assert "their license applies as well" in version.description


def test_stage_two_alone_starts_from_both_networks_and_logs_bicubic(
    folder: Path, stage_one: TrainingResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = train(folder, run_name="both", **{"init.generator": str(folder / "runs" / "one")})
    capsys.readouterr()
    changes = {
        "psnr.steps": 0,
        "init.generator": stage_one.checkpoint,
        "init.discriminator": earlier.checkpoint,
    }
    result = train(folder, run_name="two", **changes)
    assert (result.stage, result.step) == ("gan", 6)
    printed = capsys.readouterr().out
    assert (
        f"initialized generator from {stage_one.checkpoint} (sha256 {stage_one.generator_sha256[:12]})"
        in printed
    )
    assert f"initialized discriminator from {earlier.checkpoint} (sha256 " in printed
    found = re.search(r"stage 2 starts from a generator with psnr_y ([\d.]+) \(bicubic ([\d.]+)\)", printed)
    assert found is not None
    bicubic = evaluated(folder, "bicubic", tmp_path / "out")
    assert float(found[1]) == pytest.approx(stage_one.final_metrics["psnr_y"], abs=1e-4)
    assert float(found[2]) == pytest.approx(bicubic["psnr_y"], abs=1e-4)
    # It began where stage 1 had ended.
    assert at_step_zero(Storage(str(folder / "runs" / "two"))) == stage_one.final_metrics


def test_a_start_below_bicubic_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        folder, run_name="poor", **{"init.generator": published(folder / "p.pth"), "init.adopt_sizes": True}
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line for line in lines if "below bicubic" in line and "validation is" in line] == [
        line for line in lines if "validation is below bicubic: psnr_y" in line
    ]
    assert sum("validation is below bicubic" in line for line in lines) == 1
    assert sum("below bicubic: stage 2 starts from" in line for line in lines) == 1


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images on which some hundred steps of a tiny network beat bicubic."""
    folder = tmp_path_factory.mktemp("partial")
    write_photos(folder / "photos", 6, 128, seed=1)
    write_photos(folder / "held_out", 2, 96, seed=2)
    return folder


def trained(folder: Path, name: str, **changes: Any) -> TrainingResult:
    settings = {
        "psnr.steps": 100, "gan.steps": 0, "psnr.learning_rate": 3e-3, "batch_size": 8, "ema_decay": 0.95,
        "validate_every_steps": 100, "log_every_steps": 50, "checkpoint_every_steps": 100, "model.num_block": 2,
        "model.num_feat": 16, "model.num_grow_ch": 8,
    }  # fmt: skip
    return train(folder, run_name=name, **{**settings, **changes})


@pytest.fixture(scope="module")
def two_blocks(smooth: Path) -> TrainingResult:
    return trained(smooth, "two-blocks", **{"psnr.steps": 400})


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"model.num_block": 3}, "36 of 51 layers taken"),
        ({"data.scale": 2, "data.root": "data-x2"}, "35 of 36 layers taken"),
    ],
)
def test_a_partial_start_beats_a_random_one_after_equal_steps(
    smooth: Path,
    two_blocks: TrainingResult,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    counts: str,
) -> None:
    if "data.root" in changes:
        changes = {**changes, "data.root": str(smooth / changes["data.root"])}
    name = str(len(changes))
    fresh = trained(smooth, f"random-{name}", **changes)
    capsys.readouterr()
    given = {"init.generator": two_blocks.checkpoint, "init.partial": True}
    result = trained(smooth, f"partial-{name}", **changes, **given)
    assert counts in capsys.readouterr().out
    assert result.final_metrics["psnr_y"] > fresh.final_metrics["psnr_y"] + 0.2


def test_other_training_images_may_follow(folder: Path, stage_one: TrainingResult, tmp_path: Path) -> None:
    write_photos(tmp_path / "own", 2, 96, seed=8)
    own = {"data.source": str(tmp_path / "own"), "data.root": str(tmp_path / "data")}
    result = train(folder, run_name="own", **{"init.generator": stage_one.checkpoint, "gan.steps": 0, **own})
    assert result.step == 6


@pytest.mark.ray
def test_every_worker_starts_from_the_given_weights(
    ray_cluster: str, folder: Path, stage_one: TrainingResult
) -> None:
    changes = {"init.generator": stage_one.checkpoint, "psnr.steps": 2, "gan.steps": 0, "workers": 2}
    result = train(folder, run_name="workers", **changes)
    assert at_step_zero(Storage(str(folder / "runs" / "workers"))) == stage_one.final_metrics
    # Two workers, one gradient: the same weights as one worker's, up to rounding.
    alone = train(folder, run_name="alone", **{**changes, "workers": 0})
    first, second = (
        load_generator(f"{each.checkpoint}/generator.safetensors")[0] for each in (result, alone)
    )
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.ray
def test_a_sweeps_trials_start_from_the_weights_read_at_its_first_start(
    ray_cluster: str, folder: Path
) -> None:
    source = published(folder / "swept.pth")
    changes = {
        "workers": 1, "psnr.steps": 0, "gan.steps": 2, "init.generator": source, "init.adopt_sizes": True,
        "tune.name": "swept", "tune.space": {"gan.pixel_weight": {"low": 1e-3, "high": 1.0}},
    }  # fmt: skip
    for trials in (1, 2):
        values = fields(folder, **changes, **{"tune.trials": trials})
        config, _ = load_config(flags(values), description="", environment={})
        result = run_sweep(config, config.tune)
        assert len(result.trials) == trials
        Path(source).unlink(missing_ok=True)
    runs = [Storage(str(folder / "runs" / "swept" / "trials" / trial.run_name)) for trial in result.trials]
    assert at_step_zero(runs[0]) == at_step_zero(runs[1])
    identities = [IDENTITY.read(run) for run in runs]
    assert identities[0] is not None
    assert identities[0].initial["generator"].source == source
    assert identities[0].fields["model"]["num_block"] == 6
    small = {"tune.space": {"model.num_feat": {"choice": [16]}}, "tune.name": "other", "tune.trials": 1}
    again = {**changes, "init.generator": published(folder / "swept.pth"), **small}
    config, _ = load_config(flags(fields(folder, **again)), description="", environment={})
    with pytest.raises(UserError, match=r"init\.generator=.*set model\.num_feat=8"):
        run_sweep(config, config.tune)
