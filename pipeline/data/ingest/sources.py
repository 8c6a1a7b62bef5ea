"""Lists image files in a folder, a glob, a .zip archive or an s3:// prefix, in an order that depends on names alone.

All commands list folders by this module: they read the same files, and count the same ones as skipped.
"""

import glob
import lzma
import os
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow
from pyarrow import fs

from pipeline.data.ingest.decoding import EXTENSIONS, UNSUPPORTED, PhotoRejected, looks_like_photo
from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote

_LICENSE_NAMES = ("attribution", "license", "licence", "copying")
_LICENSE_BYTES = 16384
# Exceptions of corrupt or locked files and archives; zipfile does not wrap its decompressors' exceptions.
_UNREADABLE = (
    OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error, lzma.LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class PhotoFile:
    """One file of a source; `read` works in any process of the cluster with access to the source."""

    name: str  # relative to the source, forward slashes; bytes that are not UTF-8 as surrogates
    kind: Literal["file", "zip", "s3"]
    container: str  # folder, archive or prefix
    size: int  # bytes; -1 if unknown
    modified_ns: int = 0
    unreadable: str | None = None  # the reason, if listing already failed

    @property
    def path(self) -> str:
        """Container and name: unique among all files."""
        return f"{self.container}/{self.name}"

    def read(self, limit: int | None = None) -> bytes:
        """The file's bytes, at most `limit` of them. Raises PhotoRejected."""
        if self.unreadable:
            raise PhotoRejected(self.unreadable)
        try:
            if self.kind == "file":
                with (Path(self.container) / self.name).open("rb") as file:
                    return file.read(-1 if limit is None else limit)
            if self.kind == "zip":
                with _archive(self.container).open(self.name) as member:
                    return member.read(-1 if limit is None else limit)
            filesystem, base = Storage(self.container).filesystem()
            with filesystem.open_input_file(f"{base}/{self.name}") as remote:
                return remote.read(limit)
        except FileNotFoundError:
            raise PhotoRejected("cannot be read: the file no longer exists") from None
        except _UNREADABLE as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise PhotoRejected(f"cannot be read: {reason}") from None


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    photos: list[PhotoFile]
    """Those that may be images, sorted by name; `unreadable` ones among them."""
    skipped: dict[str, list[str]]
    """The other files' names, by reason."""

    def skipped_note(self, counts: Callable[[str], bool] = lambda name: True) -> str:
        """What was skipped and why, such as `2 .heic (not supported), 1 other file`; empty for nothing.

        Args:
            counts: whether a name counts.
        """
        parts = []
        for reason, names in sorted(self.skipped.items()):
            if number := sum(map(counts, names)):
                parts.append(f"{number} {reason}" + ("s" if reason == _OTHER and number > 1 else ""))
        return ", ".join(parts)


_OTHER = "other file"


@lru_cache(maxsize=4)
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def list_source(source: str, field: str = "data.source") -> Listing:
    """The files of a folder, glob, .zip archive or remote prefix; hidden folders are not searched.

    Raises:
        UserError: no such source, or no images in it; names `field`.
    """
    where = f"{field}={source}"
    if is_remote(source) or Path(source).is_dir():
        return list_folder(Storage(source), where)
    if Path(source).is_file():
        if not zipfile.is_zipfile(source):
            raise UserError(f"{where}: a file that is not a .zip archive; give its folder")
        return _sorted_out(_in_zip(Path(source).absolute()), where)
    if glob.has_magic(source):
        return _sorted_out(_in_glob(source), where)
    raise UserError(f"{where}: no such folder, archive or pattern")


def list_folder(storage: Storage, where: str) -> Listing:
    """The files of a local folder or a remote prefix. Raises UserError, with `where`: no images, or not listed."""
    files = _in_s3(storage, where) if storage.remote else _in_folder(Path(storage.uri))
    return _sorted_out(files, where)


def _sorted_out(files: Iterable[PhotoFile], where: str) -> Listing:
    """Sorts out the files that may be images. Raises UserError, with `where`, if there are none."""
    photos, skipped, count = [], defaultdict(list), 0
    for photo in sorted(files, key=lambda photo: photo.name):
        if reason := _skip_reason(photo):
            skipped[reason].append(photo.name)
        elif reason is None:
            photos.append(photo)
        count += reason != ""
    result = Listing(photos, dict(skipped))
    if not photos:
        raise UserError(f"{where}: no images (of {count} files{': ' * bool(skipped)}{result.skipped_note()})")
    return result


def one_file(path: Path) -> PhotoFile:
    """A single local file."""
    return _local(path.parent, path)


def _skip_reason(photo: PhotoFile) -> str | None:
    """Why a file is not an image; None if it may be one, empty if it does not count (hidden, of another extension)."""
    suffix = PurePosixPath(photo.name).suffix.lower()
    if PurePosixPath(photo.name).name.startswith("."):
        return "hidden" if suffix in EXTENSIONS else ""
    if suffix in UNSUPPORTED:  # before their content: a raw file is a TIFF, with a small preview
        return f"{suffix} (not supported)"
    if suffix in EXTENSIONS or _sniffed(photo):
        return None
    return photo.unreadable or _OTHER


def find_license(source: str) -> str | None:
    """Text of an ATTRIBUTION, LICENSE or COPYING file in a folder, in the folder of a glob, or in an archive."""
    if is_remote(source):
        return None
    if glob.has_magic(source) and _fixed_part(source) != Path(source).absolute().parent:
        return None
    if Path(source).is_file():
        members = _in_zip(Path(source).absolute())
        files = [file for file in members if file.name.count("/") <= 1 and _is_license(file.name)]
    else:
        folder = Path(source) if Path(source).is_dir() else _fixed_part(source)
        files = [_local(folder, path) for path in folder.iterdir() if _is_license(path.name)]
    for file in sorted(files, key=lambda file: file.name):
        with suppress(PhotoRejected):
            return file.read(_LICENSE_BYTES).decode("utf-8", "replace")
    return None


def _is_license(name: str) -> bool:
    path = PurePosixPath(name)
    return path.stem.lower() in _LICENSE_NAMES and path.suffix.lower() in ("", ".txt", ".md")


def _sniffed(photo: PhotoFile) -> bool:
    if photo.kind == "s3" or photo.unreadable:
        return False
    try:
        return looks_like_photo(photo.read(64))
    except PhotoRejected:
        return False


def _in_folder(root: Path) -> Iterator[PhotoFile]:
    visited: set[str] = set()
    failures: list[OSError] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=failures.append):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a parent folder
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in files:
            yield _local(root, Path(folder) / name)
    for failure in failures:
        name = os.path.relpath(str(failure.filename), root)
        yield PhotoFile(f"{name}/", "file", str(root), -1, 0, f"folder cannot be listed: {failure.strerror}")


def _fixed_part(pattern: str) -> Path:
    """The folder of a pattern, up to its first wildcard."""
    fixed = []
    for part in Path(pattern).absolute().parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _in_glob(pattern: str) -> Iterator[PhotoFile]:
    root = _fixed_part(pattern)
    for match in glob.iglob(str(Path(pattern).absolute()), recursive=True):  # noqa: PTH207 - Path.glob misses absolute ones
        path = Path(match)
        if path.is_dir() and not path.is_symlink():
            continue
        yield _local(root, path)


def _local(root: Path, path: Path) -> PhotoFile:
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError as error:
        broken = path.is_symlink() and not path.exists()
        reason = "broken link" if broken else f"cannot be read: {error.strerror}"
        return PhotoFile(name, "file", str(root), -1, 0, reason)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        return PhotoFile(name, "file", str(root), -1, 0, "not a regular file")
    return PhotoFile(name, "file", str(root), status.st_size, status.st_mtime_ns)


def _in_zip(path: Path) -> Iterator[PhotoFile]:
    try:
        members = zipfile.ZipFile(path).infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: corrupt archive: {error}") from None
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if not member.is_dir() and not any(part.startswith((".", "__MACOSX")) for part in parts):
            yield PhotoFile(member.filename, "zip", str(path), member.file_size, 0)


def _in_s3(storage: Storage, where: str) -> Iterator[PhotoFile]:
    filesystem, base = storage.filesystem()
    try:
        infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{where}: cannot be listed ({str(error).splitlines()[0]})") from None
    for info in infos:
        name = info.path.removeprefix(base).lstrip("/")
        if info.type == fs.FileType.File and not any(
            part.startswith(".") for part in PurePosixPath(name).parts[:-1]
        ):
            yield PhotoFile(name, "s3", storage.uri, info.size, info.mtime_ns or 0)
