"""Segments of records: written atomically, and sent only once a checkpoint covers them."""

import errno
import math

import numpy as np
import pytest
from tracking_helpers import event, records_between

from pipeline.storage import Storage
from pipeline.tracking.spool import (
    CorruptSegment,
    ImageRecord,
    Metrics,
    discard_after,
    images_at,
    published_step,
    read_segment,
    segment_steps,
    validations,
    write_segment,
)


@pytest.fixture
def run(tmp_path) -> Storage:
    return Storage(str(tmp_path / "run"))


def test_a_segment_reads_back_as_it_was_written(run: Storage) -> None:
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    records = [
        Metrics(9, 1000, {"loss/pixel": 0.1}),
        ImageRecord(10, 1001, "validation/a", image),
        event(10, "resumed\nµ"),
    ]
    write_segment(run, 10, records)
    segment = read_segment(run, 10)
    metrics, image_record, event_record = segment.records
    assert (metrics, event_record) == (records[0], records[2])
    assert (image_record.step, image_record.time_ms, image_record.key) == (10, 1001, "validation/a")
    np.testing.assert_array_equal(image_record.image, image)


def test_values_that_are_not_finite_survive(run: Storage) -> None:
    write_segment(
        run, 1, [Metrics(1, 0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)})]
    )
    values = read_segment(run, 1).records[0].values
    assert math.isnan(values["a"])
    assert (values["b"], values["c"], values["d"]) == (math.inf, -math.inf, 0.5)
    assert "NaN" not in run.read_bytes("tracking/00000001.jsonl").decode()


def test_a_later_attempt_replaces_the_segment_and_its_images(run: Storage) -> None:
    write_segment(run, 10, [*records_between(0, 10), *records_between(0, 10)])
    write_segment(run, 10, records_between(5, 10))
    assert len(read_segment(run, 10).records) == 6
    assert run.names("tracking/00000010") == ["0000.png"]


def test_a_segment_records_the_previous_step(run: Storage) -> None:
    for step in (10, 20):
        write_segment(run, step, [])
    assert [read_segment(run, step).after for step in (10, 20)] == [-1, 10]


def test_resuming_discards_segments_that_no_checkpoint_covers(run: Storage) -> None:
    for step in (10, 15, 20):
        write_segment(run, step, records_between(step - 5, step))
    discard_after(run, 10)
    assert segment_steps(run) == [10]
    assert run.names("tracking") == ["00000010", "00000010.jsonl"]


def test_a_full_disk_leaves_no_segment(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Storage.write_bytes

    def full(self: Storage, name: str, content: bytes) -> None:
        if name.endswith(".jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_segment(run, 10, records_between(0, 10))
    monkeypatch.undo()
    assert segment_steps(run) == []
    write_segment(run, 10, records_between(0, 10))
    assert len(read_segment(run, 10).records) == 11


def test_a_corrupt_segment_is_reported_with_its_path(run: Storage) -> None:
    write_segment(run, 10, records_between(0, 10))
    content = run.read_bytes("tracking/00000010.jsonl")
    run.write_bytes("tracking/00000010.jsonl", content[: len(content) // 2])
    with pytest.raises(CorruptSegment, match="00000010"):
        read_segment(run, 10)


@pytest.mark.parametrize("content", [None, b"", b"not an image", "truncated"])
def test_a_missing_or_corrupt_image_makes_its_segment_corrupt(run: Storage, content) -> None:
    write_segment(run, 10, records_between(0, 10))
    image = "tracking/00000010/0000.png"
    if content is None:
        run.remove(image)
    else:
        run.write_bytes(image, run.read_bytes(image)[:50] if content == "truncated" else content)
    with pytest.raises(CorruptSegment, match="00000010"):
        read_segment(run, 10)
    assert images_at(run, 10) == {}


def test_an_unreachable_storage_is_not_a_corrupt_segment(run: Storage, monkeypatch) -> None:
    write_segment(run, 10, records_between(0, 10))
    read = Storage.read_bytes

    def unreachable(self: Storage, name: str) -> bytes:
        if name.endswith(".png"):
            raise OSError("connection refused")
        return read(self, name)

    monkeypatch.setattr(Storage, "read_bytes", unreachable)
    with pytest.raises(OSError, match="connection refused"):
        read_segment(run, 10)


def test_only_checkpoints_with_a_manifest_count_as_published(run: Storage) -> None:
    assert published_step(run) == -1
    run.write_bytes("checkpoints/psnr-00000010/manifest.json", b"{}")
    run.write_bytes("checkpoints/gan-00000020/state.json", b"{}")
    assert published_step(run) == 10


def test_validations_are_read_from_all_segments(run: Storage) -> None:
    write_segment(run, 5, [Metrics(5, 0, {"validation/psnr_y": 20.0, "loss/pixel": 1.0})])
    image = ImageRecord(10, 0, "validation/a", np.zeros((8, 8, 3), np.uint8))
    write_segment(
        run,
        10,
        [Metrics(8, 0, {"loss/pixel": 1.0}), Metrics(10, 0, {"validation/Set5/lpips": math.nan}), image],
    )
    write_segment(run, 15, [Metrics(15, 0, {"validation/psnr_y": 21.0})])
    (run / "tracking").write_bytes("00000015.jsonl", b'{"kind": "metrics"')
    found = validations(run)
    assert found.keys() == {5, 10}
    assert found[5] == {"psnr_y": 20.0}
    assert math.isnan(found[10]["Set5/lpips"])
