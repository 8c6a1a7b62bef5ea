"""Files in a local folder or under an s3://, gs:// or abfs:// prefix, through one small interface (pyarrow.fs).

Credentials come from the environment or the instance's role, never from a URI or a config. `AWS_ENDPOINT_URL`,
`STORAGE_EMULATOR_HOST` and `AZURE_STORAGE_SERVICE_ENDPOINT` select another server than the provider's.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow
from pyarrow import fs

from pipeline.errors import UserError

LOCK = ".lock"
REMOTE_SCHEMES = ("s3", "gs", "abfs")


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local folder."""
    return uri.partition("://")[0] in REMOTE_SCHEMES and "://" in uri


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute and `~` expanded; a remote prefix only loses its trailing slash.

    Raises:
        UserError: the scheme is not supported.
    """
    if is_remote(uri):
        return uri.rstrip("/")
    if "://" in uri:
        raise UserError(f"{uri}: use a folder or an s3://, gs:// or abfs:// prefix")
    return str(Path(uri).expanduser().resolve())


def join(uri: str, *parts: str) -> str:
    """A path below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


@dataclass(frozen=True)
class Storage:
    """A local folder or a prefix in an object store.

    Names are relative, with forward slashes. Writes are atomic: locally by a rename after fsync, in an object store
    because an object appears when its upload is complete.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", absolute(self.uri))

    def __truediv__(self, name: str) -> "Storage":
        return Storage(join(self.uri, name))

    @property
    def remote(self) -> bool:
        """Whether this is an object store."""
        return is_remote(self.uri)

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """pyarrow's filesystem, and the path of this folder or prefix in it."""
        if not self.remote:
            return fs.LocalFileSystem(), self.uri
        parts = urlsplit(self.uri)
        has_user = parts.username is not None and parts.scheme != "abfs"  # abfs://CONTAINER@ACCOUNT/...
        if has_user or parts.password or parts.query:
            raise UserError(
                f"{parts.scheme}://{parts.hostname}{parts.path}: remove keys and options from the address; "
                "credentials come from the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_ENDPOINT_URL)"
            )
        if parts.scheme == "abfs":
            return _azure(
                parts.hostname or "", parts.username
            ), f"{parts.username or parts.hostname}{parts.path}"
        filesystem = _google() if parts.scheme == "gs" else _amazon()
        return filesystem, self.uri.partition("://")[2]

    def path(self, name: str = "") -> str:
        """The full path or URI of `name`."""
        return join(self.uri, name) if name else self.uri

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder `name` exists."""
        filesystem, base = self.filesystem()
        return filesystem.get_file_info(join(base, name) if name else base).type != fs.FileType.NotFound

    def size(self, name: str) -> int:
        """Size of the file `name` in bytes. Raises FileNotFoundError."""
        filesystem, base = self.filesystem()
        info = filesystem.get_file_info(join(base, name))
        if info.type != fs.FileType.File:
            raise FileNotFoundError(self.path(name))
        return info.size

    def read_bytes(self, name: str) -> bytes:
        """Content of the file `name`. Raises FileNotFoundError."""
        if not self.remote:
            path = self.path(name)
            try:
                return Path(path).read_bytes()  # also names that are not UTF-8
            except NotADirectoryError:  # below a file: missing, as in an object store
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        filesystem, base = self.filesystem()
        with filesystem.open_input_file(join(base, name)) as file:
            return file.read()

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Writes or replaces the file `name` atomically."""
        if self.remote:
            filesystem, base = self.filesystem()
            with filesystem.open_output_stream(join(base, name)) as file:
                file.write(content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A name may have the maximal length already.
        shown = target.name if len(os.fsencode(target.name)) < 200 else "long"
        partial = target.with_name(f".{shown}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(target.parent)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders directly in `folder`; empty if it does not exist."""
        filesystem, base = self.filesystem()
        root = join(base, folder) if folder else base
        # pyarrow lists no folder of a Google bucket that was not created by itself: list all files there.
        selector = fs.FileSelector(root, allow_not_found=True, recursive=filesystem.type_name == "gcs")
        paths = [info.path.removeprefix(root).lstrip("/") for info in filesystem.get_file_info(selector)]
        return sorted({path.partition("/")[0] for path in paths})

    def files(self, folder: str = "") -> Iterator[str]:
        """Names, relative to this prefix, of all files below `folder`, sorted."""
        if not self.remote:
            yield from sorted(_local_files(Path(self.path(folder)), self.uri))
            return
        filesystem, base = self.filesystem()
        selector = fs.FileSelector(
            join(base, folder) if folder else base, allow_not_found=True, recursive=True
        )
        for info in sorted(filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.type == fs.FileType.File:
                yield info.path.removeprefix(base).lstrip("/")

    def remove(self, name: str) -> None:
        """Removes the file or folder `name` if it exists."""
        if not self.remote:
            target = Path(self.path(name))
            if target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                with suppress(NotADirectoryError):
                    target.unlink(missing_ok=True)
            return
        filesystem, base = self.filesystem()
        info = filesystem.get_file_info(join(base, name))
        if info.type == fs.FileType.Directory and filesystem.type_name == "gcs":
            for file in self.files(name):
                filesystem.delete_file(join(base, file))
        elif info.type == fs.FileType.Directory:
            filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            filesystem.delete_file(info.path)

    def free_bytes(self) -> int | None:
        """Free bytes on the disk of this folder; None for an object store."""
        return None if self.remote else shutil.disk_usage(self.nearest_folder()).free

    def nearest_folder(self) -> str:
        """This folder, or its nearest existing parent; `/` for an object store."""
        folder = Path("/" if self.remote else self.uri)
        while not folder.exists():
            folder = folder.parent
        return str(folder)

    def require_writable(self, field: str) -> None:
        """Checks that files can be written here; leaves no file or folder behind.

        Raises:
            UserError: they cannot; the message names `field`.
        """
        probe = f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            if not self.remote:
                limit = os.pathconf(self.nearest_folder(), "PC_NAME_MAX")
                if any(len(os.fsencode(part)) > limit for part in Path(self.uri).parts):
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            target = self if self.remote else Storage(self.nearest_folder())
            target.write_bytes(probe, b"")
            target.remove(probe)
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{field}={self.uri}: not writable ({reason}); choose another folder") from None


def _local_files(folder: Path, base: str) -> Iterator[str]:
    """Regular files below `folder`, relative to `base`; linked folders are searched once."""
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            path = Path(root, name)
            if path.is_file():
                yield path.relative_to(base).as_posix()


def _amazon() -> fs.FileSystem:
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["scheme"], options["endpoint_override"] = _endpoint(endpoint)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return fs.S3FileSystem(**options)


def _google() -> fs.FileSystem:
    options: dict[str, Any] = {"retry_time_limit": timedelta(seconds=60)}
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        options["scheme"], options["endpoint_override"] = _endpoint(endpoint)
        options["anonymous"] = True
    return fs.GcsFileSystem(**options)


def _azure(host: str, container: str | None) -> fs.FileSystem:
    """Azure Blob Storage. The account is in the address (CONTAINER@ACCOUNT.dfs...) or in AZURE_STORAGE_ACCOUNT."""
    account = host.partition(".")[0] if container else os.environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise UserError(f"abfs://{host}: write abfs://CONTAINER@ACCOUNT/..., or set AZURE_STORAGE_ACCOUNT")
    options: dict[str, Any] = {}
    if key := os.environ.get("AZURE_STORAGE_KEY"):
        options["account_key"] = key
    if endpoint := os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT"):
        scheme, authority = _endpoint(endpoint)
        for service in ("blob", "dfs"):
            options |= {f"{service}_storage_scheme": scheme, f"{service}_storage_authority": authority}
    return fs.AzureFileSystem(account, **options)


def _endpoint(url: str) -> tuple[str, str]:
    """Scheme and authority of a server's URL."""
    scheme, _, authority = url.rstrip("/").rpartition("://")
    return scheme or "https", authority


@contextmanager
def only_writer(storage: Storage, refusal: str) -> Iterator[None]:
    """Exclusive lock on the folder, released by the OS when the process exits. An object store is not locked.

    Raises:
        UserError: `refusal`, if another process on this machine holds the lock.
    """
    if storage.remote:
        yield
        return
    folder = Path(storage.uri)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError:
            pass  # a file system without locks
        yield


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable (fsync of the folder)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
