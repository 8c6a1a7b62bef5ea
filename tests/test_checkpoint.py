"""Checkpoints: atomic, verified, kept by rule, never silently skipped."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import load_generator

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.spool import Event, read_segment
from pipeline.training import checkpoint as checkpoints
from pipeline.training import checkpointer as checkpointer_module
from pipeline.training.checkpoint import Checkpoint, CheckpointName
from pipeline.training.checkpointer import Checkpointer
from pipeline.training.config import TrainConfig
from pipeline.training.run_log import RunLog
from pipeline.training.snapshot import Snapshot
from pipeline.training.state import Best, TrainState, begin_gan, new_state
from pipeline.training.step import Batch, psnr_step
from pipeline.training.worker import Worker

CPU = torch.device("cpu")
CONFIG = TrainConfig.model_validate(
    {
        "batch_size": 2,
        "crop_px": 32,
        "model": {
            "num_block": 1,
            "num_feat": 8,
            "num_grow_ch": 4,
            "discriminator_num_feat": 4,
            "residual_scale": 0.3,
        },
        "data": {"patch_px": 64},
    }
)
SIZES = {
    "architecture": "RRDBNet",
    "num_feat": "8", "num_block": "1", "num_grow_ch": "4", "residual_scale": "0.3", "scale": "4",
}  # fmt: skip


def trained_state() -> TrainState:
    state = new_state(CONFIG, "psnr", CPU)
    generator = torch.Generator().manual_seed(0)
    lr, hr = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    psnr_step(state, Batch(lr, hr, 2), CONFIG, 1e-3)
    state.step = 1
    return state


def written(run: Storage, state: TrainState, step: int) -> CheckpointName:
    name = CheckpointName(step, state.stage)
    tensors = {key: value.detach().clone() for key, value in state.tensors().items()}
    ema = {key: value.clone() for key, value in state.ema.state_dict().items()}
    checkpoints.write(run, Checkpoint(name, ema, tensors, {**state.scalars(), "step": step}), SIZES)
    return name


def saving(run: Storage, state: TrainState) -> Checkpointer:
    return Checkpointer(CONFIG, run, state, RunLog(CONFIG, Worker(), run))


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


@pytest.mark.parametrize("stage", ["psnr", "gan"])
def test_a_state_comes_back_bit_for_bit(run: Storage, stage: str) -> None:
    state = trained_state()
    state.best, state.corrupt_patches = (Best(1, 27.5, "psnr_y"), Best(3, 26.0, "psnr_y")), 3
    if stage == "gan":
        begin_gan(state, CONFIG, CPU)
    name = written(run, state, 1)
    loaded = checkpoints.read(run, name)
    other = new_state(CONFIG.model_copy(update={"seed": 99}), stage, CPU)
    other.load(loaded.ema, loaded.tensors, loaded.scalars)
    assert other.scalars() == state.scalars()
    mine, theirs = state.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key
    for key, value in state.ema.state_dict().items():
        assert torch.equal(value, other.ema.state_dict()[key])


def test_the_generator_file_is_a_model_by_itself(run: Storage) -> None:
    state = trained_state()
    name = written(run, state, 1)
    generator, info = load_generator(Path(run.path(name.folder)) / "generator.safetensors")
    assert info["residual_scale_source"] == "metadata"
    assert generator.residual_scale == 0.3
    assert torch.equal(generator.conv_last.weight, state.ema.conv_last.weight)


@pytest.mark.parametrize(
    "file", ["generator.safetensors", "training.safetensors", "state.json", "manifest.json"]
)
def test_after_a_flipped_bit_anywhere_the_older_checkpoint_is_the_newest(
    run: Storage, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained_state()
    written(run, state, 1)
    newer = written(run, state, 2)
    content = bytearray((run / newer.folder).read_bytes(file))
    for place in {0, len(content) // 2, len(content) - 2}:
        corrupt = bytearray(content)
        corrupt[place] ^= 0x10
        (run / newer.folder).write_bytes(file, bytes(corrupt))
        caplog.clear()
        found = checkpoints.newest(run)
        assert found is not None
        assert found.name.step == 1
        assert str(newer) in caplog.text


def test_a_checkpoint_without_a_manifest_is_not_listed(run: Storage) -> None:
    name = written(run, trained_state(), 1)
    run.remove(f"{name.folder}/manifest.json")
    assert checkpoints.newest(run) is None
    with saving(run, trained_state()):
        assert run.names("checkpoints") == []


def test_only_corrupt_checkpoints_are_an_error(run: Storage) -> None:
    name = written(run, trained_state(), 1)
    (run / name.folder).write_bytes("state.json", b"{}")
    with pytest.raises(UserError, match="all 1 checkpoints are corrupt"):
        checkpoints.newest(run)


def test_checkpoints_that_lost_their_manifests_are_an_error(run: Storage) -> None:
    state = trained_state()
    for step in (1, 2):
        run.remove(f"{written(run, state, step).folder}/manifest.json")
    with pytest.raises(UserError, match=r"none of 2 checkpoints has its manifest\.json"):
        checkpoints.newest(run)


def test_non_finite_weights_are_never_written(run: Storage) -> None:
    state = trained_state()
    with torch.no_grad():
        state.ema.conv_last.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"conv_last\.weight"):
        written(run, state, 1)
    assert checkpoints.listed(run) == []


def test_old_checkpoints_are_removed_except_those_to_keep(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, order = trained_state(), []
    state.best = (Best(2, 20.0, "psnr_y"),)

    def write_segment(run: Storage, step: int, records: list[Any]) -> None:
        order.append((step, len(checkpoints.listed(run))))

    monkeypatch.setattr(checkpointer_module, "write_segment", write_segment)
    with saving(run, state) as checkpointer:
        for step in range(1, 7):
            state.step = step
            checkpointer.save()
    assert [name.step for name in checkpoints.listed(run)] == [2, 5, 6]
    # What must be durable first was called before its checkpoint appeared.
    assert order[0] == (1, 0)
    assert [step for step, _ in order] == [1, 2, 3, 4, 5, 6]


def test_a_corrupt_checkpoint_does_not_count_among_those_kept(run: Storage) -> None:
    state = trained_state()
    for step in (1, 2, 3):
        written(run, state, step)
    (run / CheckpointName(3, "psnr").folder).write_bytes("state.json", b"{}")
    state.step = 2
    with saving(run, state) as checkpointer:
        for step, expected in ((4, [2, 3, 4]), (3, [3, 4])):
            state.step = step
            checkpointer.save()
            checkpointer.finish()
            assert [name.step for name in checkpoints.listed(run)] == expected


def test_the_best_stay_in_order_and_of_equal_ones_the_earlier() -> None:
    state = new_state(CONFIG, "psnr", CPU)
    for step, value in enumerate((1.0, 3.0, 2.0, 3.0, 0.5), start=1):
        state.insert_best(Best(step, value, "psnr_y"), keep=3)
    assert [best.step for best in state.best] == [2, 4, 3]


def test_training_continues_while_a_checkpoint_is_written(run: Storage) -> None:
    state = trained_state()
    expected = state.ema.conv_last.weight.clone()
    with saving(run, state) as checkpointer:
        checkpointer.save()
        with torch.no_grad():
            state.ema.conv_last.weight.zero_()
    assert torch.equal(checkpoints.read(run, CheckpointName(1, "psnr")).ema["conv_last.weight"], expected)


def test_a_failed_write_reaches_training_with_its_reason(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer_module, "write_segment", full_disk)
    with pytest.raises(UserError, match="No space left"), saving(run, trained_state()) as checkpointer:
        checkpointer.save()
    assert checkpoints.listed(run) == []


def test_a_failed_write_leaves_no_parts(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Storage.write_bytes

    def small_disk(storage: Storage, name: str, content: bytes) -> None:
        if name == "training.safetensors":
            raise OSError(28, "No space left on device")
        write_bytes(storage, name, content)

    monkeypatch.setattr(Storage, "write_bytes", small_disk)
    with saving(run, trained_state()) as checkpointer:
        checkpointer.save()
        with pytest.raises(UserError, match="No space left"):
            checkpointer.finish()
        assert run.names("checkpoints") == []


def test_failed_writes_that_are_waited_for_are_consecutive(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(storage: Storage, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "write_bytes", full_disk)
    with saving(run, trained_state()) as checkpointer:
        for _ in range(CONFIG.faults.max_failed_saves):
            checkpointer.save()
            assert not checkpointer.written()
        checkpointer.save()
        with pytest.raises(UserError, match="could not be written"):
            checkpointer.written()


def test_training_does_not_wait_for_a_slow_write(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    release, state = threading.Event(), trained_state()
    monkeypatch.setattr(checkpointer_module, "MAX_WAIT_S", 0.0)
    write = checkpoints.write

    def slow(*arguments: Any) -> None:
        assert release.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpointer_module, "write", slow)
    with saving(run, state) as checkpointer:
        state.insert_best(Best(1, 20.0, "psnr_y"), 1)
        assert checkpointer.save()
        state.step = 2
        state.insert_best(Best(2, 21.0, "psnr_y"), 1)
        assert not checkpointer.save()
        assert not checkpointer.written()
        assert [best.step for best in state.best] == [1]
        state.step = 3
        threading.Timer(0, release.set).start()
        assert checkpointer.save(last=True)
        checkpointer.finish()
    assert [name.step for name in checkpoints.listed(run)] == [1, 3]
    text = " ".join(record.text for record in read_segment(run, 3).records if isinstance(record, Event))
    assert "skipped the checkpoint of step 2: the previous one is still being written" in text


def test_a_snapshot_keeps_values_and_memory_formats_and_its_buffers() -> None:
    snapshot = Snapshot()
    tensors = {
        "weights": torch.rand(3, 5, 4, 4).to(memory_format=torch.channels_last),
        "slice": torch.rand(4, 6)[:, ::2],
        "count": torch.tensor(3),
        "double": torch.rand(7, dtype=torch.float64),
    }
    fetched = snapshot.take(tensors)()
    expected = {name: value.clone() for name, value in tensors.items()}
    tensors["weights"].zero_()
    assert fetched.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(fetched[name], value)
        assert fetched[name].dtype == value.dtype
    assert fetched["weights"].is_contiguous(memory_format=torch.channels_last)
    again = snapshot.take(tensors)()
    assert again["weights"].data_ptr() == fetched["weights"].data_ptr()
    assert not again["weights"].any()
    assert snapshot.take({"other": torch.ones(2)})()["other"].tolist() == [1, 1]


def test_a_snapshots_tensors_are_written_although_they_share_memory(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's state goes through."""
    monkeypatch.setattr(Checkpointer, "_copies", lambda self, named: self._snapshot.take(named))
    state = trained_state()
    with saving(run, state) as checkpointer:
        checkpointer.save()
    loaded = checkpoints.read(run, CheckpointName(1, "psnr"))
    for found, expected in ((loaded.ema, state.ema.state_dict()), (loaded.tensors, state.tensors())):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_architecture_is_refused(run: Storage) -> None:
    name = written(run, trained_state(), 1)
    loaded = checkpoints.read(run, name)
    tensors = dict(loaded.tensors)
    tensors["generator.extra.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"generator\.extra\.weight"):
        new_state(CONFIG, "psnr", CPU).load(loaded.ema, tensors, loaded.scalars)


def test_other_sizes_are_refused(run: Storage) -> None:
    loaded = checkpoints.read(run, written(run, trained_state(), 1))
    larger = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"num_feat": 16})})
    with pytest.raises(
        UserError, match=r"conv_first\.weight has the shape \[8, 3, 3, 3\], but \[16, 3, 3, 3\]"
    ):
        new_state(larger, "psnr", CPU).load(loaded.ema, loaded.tensors, loaded.scalars)


def test_the_manifest_names_every_file_with_its_checksum(run: Storage) -> None:
    name = written(run, trained_state(), 1)
    manifest = json.loads((run / name.folder).read_bytes("manifest.json"))
    assert set(manifest["files"]) == {"generator.safetensors", "training.safetensors", "state.json"}
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in manifest["files"].values())
