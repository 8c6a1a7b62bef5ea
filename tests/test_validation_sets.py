"""Further validation sets: checked in the driver, read by the rank that measures an image, measured separately."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import exit_code, write_image
from gloo import run_workers
from mlflow import MlflowClient
from PIL import Image
from tiny import command, fields, flags, train, write_sets

from pipeline.config import load_config
from pipeline.data.ingest.image_set import find_pairs, read_pair
from pipeline.errors import UserError
from pipeline.imaging import bicubic_upscale, matlab_bicubic_downscale, psnr
from pipeline.metrics import FIDELITY, MetricSet
from pipeline.model import RRDBNet, seeded
from pipeline.model.config import ModelConfig
from pipeline.storage import Storage
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.spool import ImageRecord, Metrics, read_segment, segment_steps
from pipeline.training import validation, validator
from pipeline.training.checks import with_absolute_paths
from pipeline.training.config import TrainConfig
from pipeline.training.run_log import RunLog
from pipeline.training.state import new_state
from pipeline.training.validation import validate
from pipeline.training.validation_sets import ValidationSet, find_sets, open_sets
from pipeline.training.validator import Validator
from pipeline.training.worker import Worker


def load(folder: Path, **changes: Any) -> TrainConfig:
    return load_config(flags(fields(folder, **changes)), description="", environment={})[0].alone()


def write_pairs(folder: Path, count: int = 2, side: int = 64) -> dict[str, str]:
    """HR images of different sizes and their LR files, in two folders."""
    for index in range(count):
        path = write_image(folder / "HR" / f"{index}.png", side + 4 * index, side, seed=index)
        lr = matlab_bicubic_downscale(np.asarray(Image.open(path)))
        (folder / "LR").mkdir(exist_ok=True)
        Image.fromarray(lr).save(folder / "LR" / f"{index}.png")
    return {"hr": str(folder / "HR"), "lr": str(folder / "LR")}


def test_sets_are_read_in_the_layouts_of_evaluation(tmp_path: Path) -> None:
    folders = write_pairs(tmp_path / "b")
    sets = {"alone": folders["hr"], "two": folders, "one": str(tmp_path / "b")}
    config = load(tmp_path, **{"validation.sets": sets})
    files = find_sets(config)
    assert [each.name for each in files] == ["alone", "two", "one"]
    for each in files:
        assert [(image.name, image.shape) for image in each.images] == [
            ("0.png", (64, 64)),
            ("1.png", (68, 64)),
        ]
    # The digest depends on the images: with LR files it is another one than without.
    alone, two, one = (each.sha256 for each in files)
    assert two == one != alone


def test_the_digest_depends_on_the_images_and_not_on_their_names(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a" / "x.png", seed=1)
    write_image(tmp_path / "a" / "y.png", seed=2)
    write_image(tmp_path / "b" / "2.png", seed=1)
    write_image(tmp_path / "b" / "1.png", seed=2)
    config = load(tmp_path, **{"validation.sets": {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}})
    a, b = find_sets(config)
    assert a.sha256 == b.sha256
    write_image(first, seed=3)
    assert find_sets(config)[0].sha256 != b.sha256


def empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def truncated(folder: Path) -> str:
    path = write_image(folder / "a.png")
    path.write_bytes(path.read_bytes()[:-100])
    return str(folder)


def too_small(folder: Path) -> str:
    write_image(folder / "a.png", 16, 64)
    return str(folder)


def of_another_scale(folder: Path) -> dict[str, str]:
    folders = write_pairs(folder)
    write_image(Path(folders["lr"]) / "0.png", 32, 32)
    return folders


def without_matches(folder: Path) -> dict[str, str]:
    folders = write_pairs(folder)
    for path in Path(folders["lr"]).iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    return folders


INVALID = [
    (lambda folder: str(folder / "none"), r"validation\.sets\.Set5=.*/none: no such folder or file"),
    (empty, r"validation\.sets\.Set5=.*: no images"),
    (
        lambda folder: {**write_pairs(folder), "lr": "/none"},
        r"validation\.sets\.Set5\.lr=/none: no such folder",
    ),
    (truncated, r"validation\.sets\.Set5: .*/a\.png: a\.png: .*; remove or replace the file"),
    (too_small, r"validation\.sets\.Set5: .*/a\.png: 64 x 16 pixels are too few"),
    (of_another_scale, r"validation\.sets\.Set5: .* pixels are not 4 times"),
    (
        without_matches,
        r"validation\.sets\.Set5\.lr=.*: no file name matches an HR image; expected names such as 0x4\.png",
    ),
]


@pytest.mark.parametrize(("write", "message"), INVALID)
def test_an_unusable_set_is_refused_in_the_driver(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    config = load(tmp_path, **{"validation.sets": {"Set5": write(tmp_path / "set")}})
    with pytest.raises(UserError, match=message) as caught:
        find_sets(config)
    assert "\n" not in str(caught.value)


def test_an_image_too_small_for_a_metric_is_refused_in_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "set" / "a.png", 40, 40)
    monkeypatch.setattr(MetricSet, "_least_px", lambda self, name: 48)
    config = load(tmp_path, **{"validation.sets": {"Set5": str(tmp_path / "set")}})
    with pytest.raises(UserError, match=r"Set5: .*/a\.png: 40 x 40 pixels are too few for psnr_y"):
        find_sets(config)


def test_a_relative_folder_in_a_copied_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    sets = {"Set5": {"hr": str(tmp_path), "lr": "lr"}}
    with pytest.raises(UserError, match=r"validation\.sets\.Set5\.lr=lr: relative to a copy"):
        with_absolute_paths(load(tmp_path, **{"validation.sets": sets}))


def opened(folder: Path, **sets: Any) -> list[ValidationSet]:
    """Sets alone, without held-out images."""
    config = load(folder, **{"validation.sets": sets})
    files = find_sets(config)
    return [each for each in open_sets(config, files) if each.name in sets]


def test_an_image_is_the_pair_that_evaluation_reads(tmp_path: Path, no_held_out: None) -> None:
    folders = write_pairs(tmp_path / "set")
    (only,) = opened(tmp_path, Set5=folders)
    pairs, _ = find_pairs(folders["hr"], folders["lr"], 4)
    for image, pair in zip(only.images, pairs, strict=True):
        hr, lr = read_pair(pair, 4, border=4)
        assert np.array_equal(image.hr, hr)
        assert np.array_equal(image.lr, lr)
        assert image.shape == hr.shape[:2]


def test_an_image_that_changed_after_the_start_is_refused(tmp_path: Path, no_held_out: None) -> None:
    path = write_image(tmp_path / "set" / "a.png", seed=1)
    (only,) = opened(tmp_path, Set5=str(tmp_path / "set"))
    write_image(path, seed=2)
    with pytest.raises(UserError, match=r"Set5: .*a\.png has changed since the run was started"):
        only.images[0].hr  # noqa: B018


@pytest.fixture
def no_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.validation_sets.load_manifest", empty_manifest)


def empty_manifest(root: str) -> Any:
    return SimpleNamespace(root=root, held_out=())


def measured(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Metrics of two sets, and the images that this rank has read."""
    read: list[str] = []
    import pipeline.training.validation_sets as module

    real = module._read
    module.load_manifest = empty_manifest
    config = load(Path(folder), **{"validation.sets": {"A": f"{folder}/a", "B": f"{folder}/b"}})
    files = find_sets(config)
    module._read = lambda pair, *rest: (read.append(pair.hr), real(pair, *rest))[1]  # type: ignore[func-returns-value]
    network = seeded(3, lambda: RRDBNet(8, 1, 4)).eval()
    means = validate(network, open_sets(config, files), MetricSet([*FIDELITY, "color_drift"]))
    return {"means": means, "read": read}


@pytest.mark.slow
def test_sets_are_measured_equally_by_one_and_two_workers_and_read_once(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a", 3)
    write_pairs(tmp_path / "b", 2, 48)
    (alone,) = run_workers(1, measured, str(tmp_path))
    first, second = run_workers(2, measured, str(tmp_path))
    assert first["means"] == second["means"] == alone["means"]
    assert set(alone["means"]) > {"A/psnr_y", "B/psnr_y", "A/color_drift_r"}
    assert sorted(first["read"] + second["read"]) == sorted(alone["read"])
    assert len(alone["read"]) == 5
    assert 0 < len(first["read"]) < 5


def test_the_mean_of_a_set_is_over_its_images_only(tmp_path: Path, no_held_out: None) -> None:
    write_pairs(tmp_path / "a")
    write_pairs(tmp_path / "b", 3, 48)
    network, metrics = seeded(3, lambda: RRDBNet(8, 1, 4)).eval(), MetricSet(["psnr_y"])
    a, b = opened(tmp_path, A=str(tmp_path / "a"), B=str(tmp_path / "b"))
    both = validate(network, [a, b], metrics)
    assert both == {**validate(network, [a], metrics), **validate(network, [b], metrics)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with two sets in addition to the held-out images; the second one decides."""
    folder = write_sets(tmp_path_factory.mktemp("sets"))
    sets = {
        "Set5": str(write_image(folder / "set5" / "a.png").parent),
        "Set14": write_pairs(folder / "set14"),
    }
    changes = {"validation.sets": sets, "validation.select_on": "Set14"}
    return folder, train(folder, **changes, **{"tracking.register_model": True})


def test_each_set_has_its_metrics_and_images(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    run = Storage(str(folder / "runs" / "tiny"))
    records = [record for step in segment_steps(run) for record in read_segment(run, step).records]
    for name in ("psnr_y", "Set5/psnr_y", "Set14/psnr_y"):
        steps = [
            record.step
            for record in records
            if isinstance(record, Metrics) and f"validation/{name}" in record.values
        ]
        assert steps == [0, 3, 6, 9, 12]
        assert name in result.metrics
    images = {record.key for record in records if isinstance(record, ImageRecord) and record.step == 12}
    assert images == {
        "validation/image0.png", "validation/image1.png", "validation/Set5/a.png", "validation/Set14/0.png",
        "validation/Set14/1.png",
    }  # fmt: skip


def test_the_set_that_decides_chooses_the_registered_version(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    run = Storage(str(folder / "runs" / "tiny"))
    values = {
        record.step: record.values["validation/Set14/psnr_y"]
        for step in segment_steps(run)
        for record in read_segment(run, step).records
        if isinstance(record, Metrics) and "validation/Set14/psnr_y" in record.values and record.step > 6
    }
    assert result.metrics["Set14/psnr_y"] == max(values.values())
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    tags = client.get_model_version("esrgan-x4", "1").tags
    assert tags["esrgan.selected_by"] == "Set14/psnr_y"
    assert float(tags["esrgan.metric.Set14/psnr_y"]) == result.metrics["Set14/psnr_y"]
    (files,) = find_sets(load(folder, **{"validation.sets": {"Set14": str(folder / "set14")}}))
    assert tags["esrgan.evaluation_set"] == files.sha256
    assert json.loads(run.read_bytes("result.json"))["metrics"] == result.metrics
    pulled = pull_generator("models:/esrgan-x4@champion", f"sqlite:///{folder}/runs/mlflow.db")
    card = (pulled.parent.parent / "README.md").read_text()
    assert "![Set14/0.png](image-0.png)" in card
    assert "![image0.png]" not in card


def test_images_of_another_content_do_not_count_when_a_run_is_resumed(trained: tuple[Path, Any]) -> None:
    from pipeline.training.state import Best, of_metric

    bests = [Best(3, 30.0, "Set14/psnr_y", "a"), Best(6, 29.0, "Set14/psnr_y", "b"), Best(9, 31.0, "psnr_y")]
    assert of_metric(bests, "Set14/psnr_y", "b") == (bests[1],)
    assert of_metric(bests, "psnr_y", "") == (bests[2],)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_train_measure_the_sets_that_the_driver_has_found(
    ray_cluster: str, trained: tuple[Path, Any]
) -> None:
    folder, alone = trained
    sets = {"Set5": str(folder / "set5"), "Set14": str(folder / "set14")}
    changes = {"validation.sets": sets, "validation.select_on": "Set14"}
    assert train(folder, run_name="on-ray", workers=1, **changes).metrics == alone.metrics


def test_an_unusable_set_ends_the_command_with_code_2_before_ray(
    tmp_path: Path,
    trained: tuple[Path, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "pipeline.training.ray_cluster.connect", lambda config: pytest.fail("Ray was started")
    )
    folder, _ = trained
    for job in ("train_gan", "tune_gan"):
        values = fields(folder, workers=1, run_name="mistake", **{"validation.sets": {"Set5": "/none"}})
        _, program, *arguments = command(job, folder, values)
        capsys.readouterr()
        assert exit_code(Path(program).stem, *arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert lines == ["error: validation.sets.Set5=/none: no such folder or file"]


def test_the_first_validation_records_bicubic_as_the_baseline(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    run = Storage(str(folder / "runs" / "tiny"))
    baseline = {
        (record.step, name.removeprefix("bicubic/")): value
        for step in segment_steps(run)
        for record in read_segment(run, step).records
        if isinstance(record, Metrics)
        for name, value in record.values.items()
        if name.startswith("bicubic/")
    }
    assert baseline == {(0, name): value for name, value in result.bicubic_metrics.items()}
    assert result.bicubic_metrics.keys() == result.metrics.keys()
    pairs, _ = find_pairs(str(folder / "set14"), None, 4)
    images = [read_pair(pair, 4, border=4) for pair in pairs]
    expected = np.mean([psnr(bicubic_upscale(lr, 4), hr, border=4) for hr, lr in images])
    assert result.bicubic_metrics["Set14/psnr_y"] == pytest.approx(expected)


def test_bicubic_is_measured_again_on_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run whose sets have changed must not be compared with bicubic on the old images."""
    config = TrainConfig()
    state = new_state(
        config.model_copy(update={"model": ModelConfig(num_block=1, num_feat=8)}), "psnr", torch.device("cpu")
    )
    measured: list[str] = []
    monkeypatch.setattr(validator, "validate", lambda *_: {"psnr_y": 20.0})
    monkeypatch.setattr(validator, "comparison_strips", lambda *_: {})

    def bicubic(sets: list[ValidationSet], *_: object) -> dict[str, float]:
        measured.append(sets[0].sha256)
        return {"psnr_y": 25.0}

    monkeypatch.setattr(validator, "bicubic_baseline", bicubic)
    for digest in ("a", "a", "b"):
        sets = [ValidationSet("held_out", [], digest)]
        run, worker = Storage(str(tmp_path)), Worker()
        Validator(config, worker, run, sets, RunLog(config, worker, run)).validate(state)
    assert measured == ["a", "b"]


@pytest.mark.parametrize(
    ("device", "half", "expected"),
    [
        ("cuda", True, [torch.float16, torch.float32]),  # the first overflows
        ("cuda", False, [torch.float32]),
        ("cpu", True, [torch.float32]),
    ],
)
def test_an_image_that_overflows_half_precision_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, device: str, half: bool, expected: list[torch.dtype]
) -> None:
    tried = []

    def upscale(
        *_: object, dtype: torch.dtype = torch.float32, require_finite: bool = False, **__: object
    ) -> str:
        tried.append(dtype)
        if require_finite:
            raise FloatingPointError
        return "computed"

    monkeypatch.setattr(validation, "upscale", upscale)
    lr = np.zeros((4, 4, 3), np.uint8)
    assert validation._upscaled(RRDBNet(4, 1, 2), lr, torch.device(device), half) == "computed"
    assert tried == expected
