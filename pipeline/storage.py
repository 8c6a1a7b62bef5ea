"""Files in a folder or under an s3:// prefix, through one small interface.

Credentials come from the environment or the instance's role, never from a URI or a config; `AWS_ENDPOINT_URL`
points to another S3 server than Amazon's.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pyarrow
from pyarrow import fs

from pipeline.errors import UserError

LOCK = ".lock"


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a folder."""
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute and `~` expanded; an s3:// prefix only loses its trailing slash.

    Raises:
        UserError: another scheme than s3://.
    """
    if is_remote(uri):
        return uri.rstrip("/")
    if "://" in uri:
        raise UserError(f"{uri}: only folders and s3:// prefixes are supported")
    return str(Path(uri).expanduser().resolve())


def join(uri: str, *parts: str) -> str:
    """A path below `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


@dataclass(frozen=True)
class Storage:
    """A folder or an s3:// prefix.

    Names are relative, with forward slashes. A file becomes visible whole or not at all: locally by a rename after
    fsync, on S3 by the nature of an upload.
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
        """pyarrow's filesystem, and this prefix's path in it."""
        if not self.remote:
            return fs.LocalFileSystem(), self.uri
        parts = urlsplit(self.uri)
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"s3://{parts.hostname}{parts.path}: leave keys and options out of the address; "
                "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
            )
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options: dict[str, object] = {"connect_timeout": 10, "request_timeout": 60}
        if endpoint:
            scheme, _, host = endpoint.rstrip("/").rpartition("://")
            options.update(endpoint_override=host, scheme=scheme or "https")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region:
            options["region"] = region
        return fs.S3FileSystem(**options), self.uri.removeprefix("s3://")

    def path(self, name: str = "") -> str:
        """The full address of `name`."""
        return join(self.uri, name) if name else self.uri

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder `name` is there."""
        filesystem, base = self.filesystem()
        return filesystem.get_file_info(join(base, name) if name else base).type != fs.FileType.NotFound

    def size(self, name: str) -> int:
        """Size of file `name` in bytes. Raises FileNotFoundError."""
        filesystem, base = self.filesystem()
        info = filesystem.get_file_info(join(base, name))
        if info.type != fs.FileType.File:
            raise FileNotFoundError(self.path(name))
        return info.size

    def read_bytes(self, name: str) -> bytes:
        """The whole of file `name`. Raises FileNotFoundError."""
        filesystem, base = self.filesystem()
        with filesystem.open_input_file(join(base, name)) as file:
            return file.read()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes file `name`, whole or not at all; what it held before is replaced."""
        if self.remote:
            filesystem, base = self.filesystem()
            with filesystem.open_output_stream(join(base, name)) as file:
                file.write(content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
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
        """Sorted names of the files and folders directly in `folder`; empty where there is none."""
        filesystem, base = self.filesystem()
        selector = fs.FileSelector(join(base, folder) if folder else base, allow_not_found=True)
        return sorted(PurePosixPath(info.path).name for info in filesystem.get_file_info(selector))

    def files(self, folder: str = "") -> Iterator[str]:
        """Names, relative to this prefix, of all files below `folder`, sorted."""
        filesystem, base = self.filesystem()
        selector = fs.FileSelector(
            join(base, folder) if folder else base, allow_not_found=True, recursive=True
        )
        for info in sorted(filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.type == fs.FileType.File:
                yield info.path.removeprefix(base).lstrip("/")

    def remove(self, name: str) -> None:
        """Removes the file or folder `name`, if it is there."""
        if not self.remote:
            target = Path(self.path(name))
            if target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
            return
        filesystem, base = self.filesystem()
        info = filesystem.get_file_info(join(base, name))
        if info.type == fs.FileType.Directory:
            filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            filesystem.delete_file(info.path)

    def free_bytes(self) -> int | None:
        """Free space where this folder lies or will lie; None for an object store."""
        return None if self.remote else shutil.disk_usage(self.nearest_folder()).free

    def nearest_folder(self) -> str:
        """This folder, or the nearest above it that exists; `/` for an object store."""
        folder = Path("/" if self.remote else self.uri)
        while not folder.exists():
            folder = folder.parent
        return str(folder)

    def require_writable(self, field: str) -> None:
        """Checks that files can be made here, and leaves neither file nor folder.

        Raises:
            UserError: naming `field`, when they cannot.
        """
        probe = f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            if not self.remote:
                limit = os.pathconf(self.nearest_folder(), "PC_NAME_MAX")
                if any(len(os.fsencode(part)) > limit for part in Path(self.uri).parts):
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            place = self if self.remote else Storage(self.nearest_folder())
            place.write_bytes(probe, b"")
            place.remove(probe)
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{field}={self.uri}: cannot write there ({reason}); choose another place"
            ) from None


@contextmanager
def only_writer(storage: Storage, refusal: str) -> Iterator[None]:
    """Keeps a second process on this machine out of a folder; the system frees the lock on any end.

    Raises:
        UserError: `refusal`, when another process is in it. An object store is not locked.
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
    """Makes a rename in `folder` durable, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
