"""Data sets and photographs on an object store: the same bytes as in a folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3 import s3_bucket
from tiny import write_photos

from pipeline.data import check_source, cutting, load_manifest, prepare, read_held_out
from pipeline.data.config import DataConfig
from pipeline.data.feed import Feed
from pipeline.data.reader import DamagedPatch, PatchReader
from pipeline.data.verify import verify
from pipeline.errors import UserError
from pipeline.storage import Storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch) as address:
        yield address


def upload(folder: Path, address: str) -> None:
    for path in folder.iterdir():
        Storage(address).write_bytes(path.name, path.read_bytes())


def config(**changes: object) -> DataConfig:
    return DataConfig.model_validate({"patch_px": 64, "patch_step_px": 32, **changes})


def test_a_data_set_on_s3_is_the_one_in_a_folder(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.build._MIB", 400)
    for name, count, side in (("photos", 3, 100), ("held_out", 2, 64)):
        upload(write_photos(tmp_path / name, count, side, seed=len(name)), f"{bucket}/{name}")
    here = config(
        source=str(tmp_path / "photos"), held_out=str(tmp_path / "held_out"), root=str(tmp_path / "data")
    )
    there = config(source=f"{bucket}/photos", held_out=f"{bucket}/held_out", root=f"{bucket}/sets/one")
    check_source(there)
    prepare(here, progress=False, on_ray=False)

    # Interrupted once on the way.
    real, done = cutting.cut_photo, []

    def interrupted(job, data, paired):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job.index)
        yield from real(job, data, paired)

    monkeypatch.setattr(cutting, "cut_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(there, progress=False, on_ray=False)
    with pytest.raises(UserError, match="ingest was interrupted"):
        load_manifest(there.root)
    monkeypatch.setattr(cutting, "cut_photo", real)
    prepare(there, progress=False, on_ray=False)

    storage = Storage(there.root)
    assert {name: storage.read_bytes(name) for name in storage.files()} == {
        path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()
    }
    manifest = load_manifest(there.root)
    assert len(manifest.shards) > 1
    assert verify(manifest, progress=False) == []
    assert [photo.name for photo in read_held_out(there.root)] == ["picture0.png", "picture1.png"]
    local, remote = (
        Feed(root, seed=0, batch_size=4, crop_px=32).batches(0, 5) for root in (here.root, there.root)
    )
    for one, other in zip(local, remote, strict=True):
        assert (one.hr == other.hr).all()
        assert (one.lr == other.lr).all()


def test_damage_on_s3_is_found(bucket: str, tmp_path: Path) -> None:
    data = config(source=str(write_photos(tmp_path / "photos", 2, 100, seed=1)), root=f"{bucket}/set")
    prepare(data, progress=False, on_ray=False)
    manifest = load_manifest(data.root)
    storage, name = Storage(data.root), manifest.shards[0].name
    content = bytearray(storage.read_bytes(name))
    reader = PatchReader(data.root, manifest.layout)
    place = bytes(content).index(reader.patch(7)[0].tobytes())
    content[place + 64 * 3 * 20] ^= 4  # in its row 20
    storage.write_bytes(name, bytes(content))
    reader = PatchReader(data.root, manifest.layout)
    with pytest.raises(DamagedPatch, match="row 7"):
        reader.crop(7, 0, 0, 32)
    assert np.array_equal(reader.crop(6, 0, 0, 32)[0].shape, (32, 32, 3))
    (line,) = verify(manifest, progress=False)
    assert "row 7" in line
    storage.remove(name)
    (line,) = verify(manifest, progress=False)
    assert line == f"s3://photographs/set/{name}: missing"


def test_the_sample_photographs_go_to_s3(bucket: str) -> None:
    data = config(source="sample", root=f"{bucket}/sample", patch_px=256, patch_step_px=256)
    check_source(data)
    assert prepare(data, progress=False, on_ray=False).sources == 6
    assert len(read_held_out(data.root)) == 2


def test_mistakes_on_s3_are_one_line(bucket: str, tmp_path: Path) -> None:
    photos = str(write_photos(tmp_path / "photos", 1, 100, seed=1))
    with pytest.raises(UserError, match=r"data\.root=s3://no-such-bucket/x: cannot write there"):
        check_source(config(source=photos, root="s3://no-such-bucket/x"))
    with pytest.raises(UserError, match=r"data\.source=s3://photographs/empty: no photographs there"):
        check_source(config(source=f"{bucket}/empty", root=f"{bucket}/x"))
    with pytest.raises(UserError, match=r"data\.source=s3://no-such-bucket/x"):
        check_source(config(source="s3://no-such-bucket/x", root=f"{bucket}/x"))
    with pytest.raises(UserError, match="leave keys and options out of the address"):
        check_source(config(source="s3://key:secret@bucket/x", root=f"{bucket}/x"))
