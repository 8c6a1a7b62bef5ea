"""Downloads DIV2K's official archives: resumes after an interruption, keeps only files with the published sha256."""

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.format.local_copy import file_sha256
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.storage import sync_folder

_ATTEMPTS = 5  # consecutive, without a new byte
_PAUSE_S = 1.0  # before the second of them; doubled before each further one
_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A file with a published size and sha256."""

    name: str
    size: int
    sha256: str


# Sizes and sha256 as TensorFlow Datasets publishes them (url_checksums/div2k.txt).
DIV2K_TRAIN = Archive(
    "DIV2K_train_HR.zip", 3530603713, "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"
)
DIV2K_HELD_OUT = Archive(
    "DIV2K_valid_HR.zip", 448993893, "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"
)


def missing_bytes(archive: Archive, folder: Path) -> int:
    """Bytes that `download` still has to fetch into `folder`."""
    if _complete(archive, folder):
        return 0
    partial = _partial(archive, folder)
    return archive.size - (min(partial.stat().st_size, archive.size) if partial.exists() else 0)


def download(archive: Archive, base_url: str, folder: Path) -> Path:
    """Downloads base_url/name into `folder` and returns its path; an existing file is not downloaded again.

    Received bytes are kept in a .partial file, which the next attempt resumes. The file gets its name only after its
    sha256 was verified.

    Raises:
        UserError: not found, wrong content, or several consecutive attempts without new data.
    """
    target, partial, url = folder / archive.name, _partial(archive, folder), f"{base_url}/{archive.name}"
    if _complete(archive, folder):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    resumed = partial.exists()
    while True:
        _complete_partial(archive, url, partial)
        sha256 = file_sha256(partial)
        if sha256 == archive.sha256:
            partial.replace(target)
            sync_folder(folder)
            return target
        partial.unlink()
        if not resumed:
            raise UserError(f"{url}: its sha256 is {sha256}, not {archive.sha256}: not the published file")
        # The first bytes came from an earlier attempt, perhaps from another server: retry from the start.
        resumed = False


def _partial(archive: Archive, folder: Path) -> Path:
    return folder / f"{archive.name}.partial"


def _complete(archive: Archive, folder: Path) -> bool:
    target = folder / archive.name
    return target.is_file() and target.stat().st_size == archive.size


def _complete_partial(archive: Archive, url: str, partial: Path) -> None:
    """Appends to the partial file until it has the published size."""
    failures, reason = 0, ""
    with (
        partial.open("ab") as file,
        progress_bar(
            total=archive.size, initial=file.tell(), unit="B", unit_scale=True, desc=archive.name
        ) as bar,
    ):
        while (before := file.tell()) != archive.size:
            if failures == _ATTEMPTS:
                raise UserError(
                    f"{url}: {reason} (no data received in {_ATTEMPTS} attempts); run again to resume"
                )
            if failures:
                time.sleep(_PAUSE_S * 2 ** (failures - 1))
            try:
                _append(url, file, archive.size, bar)
                reason = f"the connection ended at byte {file.tell()} of {archive.size}"
            except urllib.error.HTTPError as error:
                if 400 <= error.code < 500 and error.code not in (408, 416, 429):
                    raise UserError(f"{url}: HTTP status {error.code} {error.reason}") from None
                if error.code == 416:
                    file.truncate(0)
                reason = f"HTTP status {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
            file.flush()
            file.seek(0, os.SEEK_END)
            failures = 0 if file.tell() > before else failures + 1
        os.fsync(file.fileno())


def _append(url: str, file: BinaryIO, size: int, bar: Any) -> None:
    """Appends the bytes of one request, up to `size` bytes in total. Raises OSError: not the requested range."""
    have = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != have or match[2] not in ("*", str(size)):
                raise OSError(f"unexpected range {response.headers.get('Content-Range')}")
        else:
            length = response.headers.get("Content-Length")
            if length is not None and int(length) != size:
                raise OSError(f"has {length} bytes, expected {size}")
            # The server does not support ranges: from the start.
            file.truncate(0)
            have = 0
        bar.n = have
        while chunk := response.read(min(_CHUNK_BYTES, size - have + 1)):
            have += len(chunk)
            if have > size:
                raise UserError(f"{url}: sends more than {size} bytes: not the published file")
            file.write(chunk)
            bar.update(len(chunk))
