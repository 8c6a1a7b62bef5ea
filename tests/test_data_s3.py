"""Data sets and images in an object store: the same bytes as in a folder."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import fs
from s3 import s3_bucket, start_server
from tiny import write_photos
from tiny_patches import write_patches

from pipeline.data import check_source, has_manifest, load_manifest, prepare, read_held_out
from pipeline.data.config import DataConfig
from pipeline.data.feed import Feed
from pipeline.data.feed.fetch import REQUESTS
from pipeline.data.format import reader
from pipeline.data.format.local_copy import local_copy
from pipeline.data.format.reader import CorruptPatch, PatchReader, StoreUnreachable
from pipeline.data.format.verify import verify
from pipeline.data.ingest import prepare as prepare_module
from pipeline.data.ingest.sources import list_source
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
    return DataConfig.model_validate({"patch_px": 64, "patch_stride_px": 32, **changes})


def test_a_data_set_on_s3_is_the_one_in_a_folder(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.ingest.writer._MIB", 400)
    for name, count, side in (("photos", 3, 100), ("held_out", 2, 64)):
        upload(write_photos(tmp_path / name, count, side, seed=len(name)), f"{bucket}/{name}")
    local_config = config(
        source=str(tmp_path / "photos"), held_out=str(tmp_path / "held_out"), root=str(tmp_path / "data")
    )
    remote_config = config(
        source=f"{bucket}/photos", held_out=f"{bucket}/held_out", root=f"{bucket}/sets/one"
    )
    check_source(remote_config)
    prepare(local_config, on_ray=False)

    # Interrupted once.
    real, done = prepare_module.cut_image, []

    def interrupted(job, data, paired):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job.index)
        return real(job, data, paired)

    monkeypatch.setattr(prepare_module, "cut_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(remote_config, on_ray=False)
    with pytest.raises(UserError, match="ingest was interrupted"):
        load_manifest(remote_config.root)
    monkeypatch.setattr(prepare_module, "cut_image", real)
    prepare(remote_config, on_ray=False)

    storage = Storage(remote_config.root)
    assert {name: storage.read_bytes(name) for name in storage.files()} == {
        path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()
    }
    manifest = load_manifest(remote_config.root)
    assert len(manifest.shards) > 1
    assert verify(manifest) == []
    assert [photo.name for photo in read_held_out(load_manifest(remote_config.root))] == [
        "image0.png",
        "image1.png",
    ]
    local, remote = (
        Feed(root, seed=0, batch_size=4, crop_px=32).batches(0, 5)
        for root in (local_config.root, remote_config.root)
    )
    for one, other in zip(local, remote, strict=True):
        assert (one.hr == other.hr).all()
        assert (one.lr == other.lr).all()


def test_corruption_on_s3_is_found(bucket: str, tmp_path: Path) -> None:
    data = config(source=str(write_photos(tmp_path / "photos", 2, 100, seed=1)), root=f"{bucket}/set")
    prepare(data, on_ray=False)
    manifest = load_manifest(data.root)
    storage, name = Storage(data.root), manifest.shards[0].name
    content = bytearray(storage.read_bytes(name))
    patches = PatchReader(manifest)
    place = bytes(content).index(patches.patch(7)[0].tobytes())
    content[place + 64 * 3 * 20] ^= 4  # in its row 20
    storage.write_bytes(name, bytes(content))
    patches = PatchReader(manifest)
    with pytest.raises(CorruptPatch, match="row 7"):
        patches.crop(7, 0, 0, 32)
    assert np.array_equal(patches.crop(6, 0, 0, 32)[0].shape, (32, 32, 3))
    (line,) = verify(manifest)
    assert "row 7" in line
    storage.remove(name)
    (line,) = verify(manifest)
    assert line == f"s3://images/set/{name}: missing"


def before_each_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Calls `act` with the offset before every range read of a remote shard."""
    real = PatchReader._open

    def opened(self: PatchReader, number: int) -> object:
        file = real(self, number)

        def read_at(size: int, offset: int) -> bytes:
            if self.remote:
                act(offset)
            return file.read_at(size, offset)

        return SimpleNamespace(read_at=read_at)

    monkeypatch.setattr(PatchReader, "_open", opened)


def test_a_temporarily_unreachable_store_is_retried(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = f"{bucket}/set"
    upload(Path(write_patches(tmp_path, 13, rows=5)), root)
    feed = Feed(root, seed=3, batch_size=6, crop_px=16)
    whole = list(feed.batches(0, 8))

    attempted: set[int] = set()

    def fail_first(offset: int) -> None:
        """A connection that fails at the first read of every offset."""
        if offset not in attempted:
            attempted.add(offset)
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    before_each_read(monkeypatch, fail_first)
    monkeypatch.setattr(reader, "RETRY_AFTER_S", (0.0, 0.0, 0.0))
    for one, other in zip(whole, feed.batches(0, 8), strict=True):
        assert (one.hr == other.hr).all()
        assert other.corrupt == 0
    assert "retrying in" in caplog.text


def test_requests_to_a_store_are_concurrent(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequential requests would take the batch size times the store's latency."""
    root = f"{bucket}/set"
    local = write_patches(tmp_path, 40)
    upload(Path(local), root)
    requests = itertools.count(1)
    enough = threading.Event()

    def wait_for_others(offset: int) -> None:
        """Returns only once half of the maximum number of requests are pending."""
        if next(requests) == REQUESTS // 2:
            enough.set()
        assert enough.wait(timeout=60)

    before_each_read(monkeypatch, wait_for_others)
    feeds = [Feed(address, seed=3, batch_size=REQUESTS // 2, crop_px=16) for address in (local, root)]
    for one, other in zip(*(feed.batches(0, 6) for feed in feeds), strict=True):
        assert (one.hr == other.hr).all()
    assert enough.is_set()


def without_client_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns off the retries of Arrow's S3 client: an unreachable store costs seconds with them."""
    once = functools.partial(fs.S3FileSystem, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))
    monkeypatch.setattr(fs, "S3FileSystem", once)


def test_an_unreachable_store_is_not_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "RETRY_AFTER_S", (0.0, 0.0))
    without_client_retries(monkeypatch)
    server = start_server()
    with s3_bucket(monkeypatch, server) as address:
        upload(Path(write_patches(tmp_path, 5)), f"{address}/set")
        manifest = load_manifest(f"{address}/set")
        patches = PatchReader(manifest)
        patches.crop(0, 0, 0, 16)
    server.stop()
    with pytest.raises(
        StoreUnreachable, match=r"set/patches-00000\.parquet: the object store is unreachable"
    ):
        patches.crop(1, 0, 0, 16)
    with pytest.raises(UserError, match=r"is unreachable.*verify again"):
        verify(manifest)


def test_the_sample_images_are_prepared_on_s3(bucket: str) -> None:
    data = config(source="sample", root=f"{bucket}/sample", patch_px=256, patch_stride_px=256)
    check_source(data)
    assert prepare(data, on_ray=False).sources == 6
    assert len(read_held_out(load_manifest(data.root))) == 2


def test_an_unreachable_store_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    without_client_retries(monkeypatch)
    for ask in (
        lambda: has_manifest(f"{bucket}/x"),
        lambda: list_source(f"{bucket}/photos", "data.held_out"),
    ):
        with pytest.raises(
            UserError, match=r"^data\.(root|held_out)=s3://.*(unreachable|cannot be listed)"
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_mistakes_on_s3_are_one_line(bucket: str, tmp_path: Path) -> None:
    photos = str(write_photos(tmp_path / "photos", 1, 100, seed=1))
    with pytest.raises(UserError, match=r"data\.root=s3://no-such-bucket/x: not writable"):
        check_source(config(source=photos, root="s3://no-such-bucket/x"))
    with pytest.raises(UserError, match=r"data\.source=s3://images/empty: no images"):
        check_source(config(source=f"{bucket}/empty", root=f"{bucket}/x"))
    with pytest.raises(UserError, match=r"data\.source=s3://no-such-bucket/x"):
        check_source(config(source="s3://no-such-bucket/x", root=f"{bucket}/x"))
    with pytest.raises(UserError, match="remove keys and options from the address"):
        check_source(config(source="s3://key:secret@bucket/x", root=f"{bucket}/x"))


def test_a_remote_data_set_is_copied_once_per_node_and_verified(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = write_patches(tmp_path / "data", 13, rows=5)
    upload(tmp_path / "data", f"{bucket}/set")
    fields = {"seed": 3, "batch_size": 4, "crop_px": 16}
    expected = [batch.hr.tobytes() for batch in Feed(local, **fields).batches(0, 6)]
    cache = tmp_path / "cache"

    def batches() -> list[bytes]:
        feed = Feed(f"{bucket}/set", **fields, local_cache=str(cache))
        return [batch.hr.tobytes() for batch in feed.batches(0, 6)]

    assert batches() == expected
    assert capsys.readouterr().out.startswith("copying ")
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()
    }
    # An interrupted copy: no manifest, and a shard that is not complete.
    (copy / "manifest.json").unlink()
    (copy / "patches-00001.parquet").write_bytes(b"part")
    kept = (copy / "patches-00000.parquet").stat().st_mtime_ns
    assert batches() == expected
    assert (copy / "patches-00000.parquet").stat().st_mtime_ns == kept
    capsys.readouterr()
    assert batches() == expected
    assert capsys.readouterr().out == ""
    assert local_copy(local, str(cache)) == local


def test_a_copy_that_differs_or_does_not_fit_is_refused(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_patches(tmp_path / "data", 6, rows=3)
    upload(tmp_path / "data", f"{bucket}/set")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"data\.local_cache=.*0\.0 GiB free"):
            local_copy(f"{bucket}/set", str(tmp_path / "cache"))
    shard = Storage(f"{bucket}/set").read_bytes("patches-00001.parquet")
    Storage(f"{bucket}/set").write_bytes("patches-00001.parquet", shard[:-1] + b"?")
    with pytest.raises(UserError, match=r"patches-00001\.parquet: differs from its checksum"):
        local_copy(f"{bucket}/set", str(tmp_path / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.local_cache=.*cannot be written"):
        local_copy(f"{bucket}/set", str(tmp_path / "file"))
