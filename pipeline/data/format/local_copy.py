"""A verified copy of a remote data set on this node's own disk."""

import fcntl
import hashlib
import shutil
from pathlib import Path

from pyarrow import fs

from pipeline.data.format.manifest import NAME, Shard, load_manifest
from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote


def local_copy(root: str, folder: str | None) -> str:
    """The root of a copy of the data set at `root` below `folder`; `root` itself if it is local, or without a folder.

    The first process on a node makes the copy, shard by shard, and others wait for it. Every shard is compared with its
    sha256 in the manifest; an interrupted copy resumes after its last complete shard. The copy's name is the digest of
    the manifest, so a data set that was prepared again is copied again.

    Raises:
        UserError: the disk is too small, or a shard does not match the manifest.
    """
    if folder is None or not is_remote(root):
        return root
    manifest = load_manifest(root)
    target = Path(folder).expanduser() / f"data-{manifest.sha256[:16]}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / NAME).exists():
                _copy(Storage(root), target, [*manifest.shards, *manifest.held_out], folder)
                Storage(str(target)).write_bytes(NAME, manifest.content)
    except OSError as error:
        raise UserError(f"data.local_cache={folder}: cannot be written ({error.strerror or error})") from None
    return str(target)


def _copy(source: Storage, target: Path, shards: list[Shard], folder: str) -> None:
    missing = [shard for shard in shards if file_sha256(target / shard.name) != shard.sha256]
    needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"data.local_cache={folder}: {free / 2**30:.1f} GiB free, and the data set's shards take "
            f"{needed / 2**30:.1f} GiB; choose another folder, or train without data.local_cache"
        )
    if missing:
        print(f"copying {needed / 2**30:.2f} GiB of {source.uri} to {target}", flush=True)
    filesystem, base = source.filesystem()
    for shard in missing:
        partial = target / f"{shard.name}.partial"
        fs.copy_files(
            f"{base}/{shard.name}", str(partial), filesystem, destination_filesystem=fs.LocalFileSystem()
        )
        if file_sha256(partial) != shard.sha256:
            partial.unlink()
            raise UserError(
                f"{source.path(shard.name)}: differs from its checksum in {NAME}; check with prepare_data.py --verify"
            )
        partial.rename(target / shard.name)


def file_sha256(path: Path) -> str:
    """The file's digest; empty if it does not exist."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
