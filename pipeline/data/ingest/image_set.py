"""A set of images to measure on: finds and reads HR images alone, or HR images with their LR files."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow

from pipeline.data.ingest.decoding import EXTENSIONS, PhotoRejected, read_photo
from pipeline.data.ingest.layout import (
    Folders,
    hr_folders,
    is_marked_hr,
    lr_candidates,
    lr_files,
    lr_next_to_hr,
    require_marked_hr,
    split_folders,
)
from pipeline.data.ingest.sources import Listing, PhotoFile, list_folder, one_file
from pipeline.errors import UserError
from pipeline.imaging import Image, matlab_bicubic_downscale
from pipeline.imaging.alignment import pair_fault
from pipeline.imaging.metrics import SSIM_WINDOW_PX
from pipeline.storage import Storage, is_remote


@dataclass(frozen=True)
class Pair:
    """An HR image and, if it exists, its LR file; both are full addresses."""

    name: str
    hr: str
    lr: str | None


@dataclass(frozen=True)
class Rejected:
    """A file that is not used, and the reason."""

    path: str
    reason: str


def images_in(uri: str, flag: str) -> tuple[Storage, Listing]:
    """The folder and the images below it; for a file, its folder and the file.

    Args:
        uri: a folder, a file, or a prefix in an object store.
        flag: what errors call it: a flag such as `--hr`, or a field with `=`.

    Raises:
        UserError: the folder or file does not exist, or has no images.
    """
    if not is_remote(uri) and Path(uri).expanduser().is_file():
        file = one_file(Path(uri).expanduser().absolute())
        return Storage(file.container), Listing([file], {})
    storage = Storage(uri)
    if storage.remote and PurePosixPath(storage.uri).suffix.lower() in EXTENSIONS and storage.exists():
        folder, _, name = storage.uri.rpartition("/")
        return Storage(folder), Listing([PhotoFile(name, "s3", folder, -1)], {})
    if not storage.exists():
        raise UserError(f"{_named(flag, uri)}: no such folder or file")
    return storage, list_folder(storage, _named(flag, uri))


def find_pairs(
    hr: str, lr: str | None, scale: int, flags: tuple[str, str] = ("--hr", "--lr")
) -> tuple[list[Pair], list[Rejected]]:
    """The images of a set, sorted by name.

    Folder and file names are matched by `pipeline.data.ingest.layout`, as in ingest. If only some subfolders of `hr`
    are HR folders, the others are not used; without `lr`, the LR folder next to them is used. The choice is printed.

    Args:
        hr: HR images: a folder, a file, or a prefix in an object store.
        lr: LR images of the same names; None: those in `hr`, or none.
        scale: of the LR images.
        flags: what messages call `hr` and `lr`; see `images_in`.

    Raises:
        UserError: a folder is missing or empty, no HR file has an LR file, or the LR files are ambiguous.
    """
    unreadable: list[Rejected] = []
    pairs, rejected = _found(hr, lr, scale, flags, unreadable)
    return pairs, unreadable + rejected


def _found(
    hr: str, lr: str | None, scale: int, flags: tuple[str, str], unreadable: list[Rejected]
) -> tuple[list[Pair], list[Rejected]]:
    hr_flag, lr_flag = flags
    storage, names = _names_in(hr, hr_flag, unreadable)
    folders = split_folders(names, scale)
    if folders is not None:
        names = folders.hr
    hr_paths = _below(storage, names, hr_folders(names) if folders is not None else [])
    if lr is not None:
        lr_storage, lr_names = _names_in(lr, lr_flag, unreadable)
        lr_paths = _below(lr_storage, lr_files(lr_names, scale), [])
        if len(hr_paths) == len(lr_paths) == 1:
            (name, path), (lr_path,) = *hr_paths.items(), lr_paths.values()
            return [Pair(name, path, lr_path)], []
        return _match(hr_paths, lr_paths, scale, lr, _named(lr_flag, lr))
    if folders is not None:
        chosen = _lr_folders(folders, hr, flags)
        skipped = sorted({*folders.other_lr, *folders.versions}) + (["other files"] if folders.rest else [])
        print(
            f"note: {_named(hr_flag, hr)}: HR images from {', '.join(hr_folders(names))}; "
            + (f"LR images from {', '.join(chosen)}" if chosen else "LR images made by bicubic")
            + (f"; skipped: {', '.join(skipped)}" if skipped else ""),
            flush=True,
        )
        if chosen:
            lr_paths = _below(storage, [name for folder in chosen for name in folders.lr[folder]], [])
            folder = f"{hr}/{chosen[0]}"
            return _match(hr_paths, lr_paths, scale, folder, _named(hr_flag, folder))
    adjacent = lr_next_to_hr(hr_paths)
    require_marked_hr(adjacent, _named(hr_flag, hr), f"and pass it as {lr_flag.removesuffix('=')}")
    if adjacent:
        marked = {name: path for name, path in hr_paths.items() if is_marked_hr(name)}
        lr_paths = {name: hr_paths[name] for name in adjacent}
        pairs, rejected = _match(marked, lr_paths, scale, hr, _named(hr_flag, hr))
        rest = [path for name, path in hr_paths.items() if name not in marked and name not in lr_paths]
        return pairs, rejected + [Rejected(path, "neither HR nor LR in its name") for path in rest]
    return [Pair(name, path, None) for name, path in hr_paths.items()], []


def read_pair(pair: Pair, scale: int, border: int) -> tuple[Image, Image]:
    """An HR image, cut to a multiple of the scale, and its LR image; both uint8 (H, W, 3).

    Without an LR file the HR image is downscaled by MATLAB's bicubic. With one, the HR image may exceed `scale` times
    its size by up to `scale` - 1 pixels; it is cut.

    Args:
        pair: the files.
        scale: of the LR image.
        border: pixels that metrics exclude at each edge; the image must be large enough for SSIM without them.

    Raises:
        PhotoRejected: with the reason.
    """
    hr = _read(pair.hr)
    lr = None if pair.lr is None else _read(pair.lr)
    height, width = (size // scale * scale for size in hr.shape[:2])
    if lr is not None and lr.shape[:2] != (height // scale, width // scale):
        raise PhotoRejected(size_mismatch((hr.shape[1], hr.shape[0]), (lr.shape[1], lr.shape[0]), scale))
    minimum = 2 * border + SSIM_WINDOW_PX
    if min(height, width) < minimum:
        raise PhotoRejected(f"{width} x {height} pixels are too few for border={border} (at least {minimum})")
    hr = np.ascontiguousarray(hr[:height, :width])
    if lr is None:
        return hr, matlab_bicubic_downscale(hr, scale)
    if fault := pair_fault(hr, lr, scale):
        raise PhotoRejected(fault)
    return hr, lr


def size_mismatch(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> str:
    """The reason why two sizes (width, height) do not match."""
    return (
        f"its {hr[0]} x {hr[1]} pixels are not {scale} times the low-resolution file's {lr[0]} x {lr[1]} "
        f"({lr[0] * scale} x {lr[1] * scale} expected)"
    )


def _read(path: str) -> Image:
    folder, _, name = path.rpartition("/")
    try:
        return read_photo(Storage(folder or "/").read_bytes(name)).pixels
    except PhotoRejected as error:
        raise PhotoRejected(f"{name}: {error}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise PhotoRejected(f"{name}: cannot be read ({str(error).splitlines()[0]})") from None


def _named(flag: str, uri: str) -> str:
    """`--hr DIR`, or `field=DIR`."""
    return f"{flag}{'' if flag.endswith('=') else ' '}{uri}"


def _names_in(uri: str, flag: str, unreadable: list[Rejected]) -> tuple[Storage, list[str]]:
    """Folder and names of the images that can be read; prints what was skipped, and collects `unreadable`."""
    storage, found = images_in(uri, flag)
    if skipped := found.skipped_note():
        print(f"note: {_named(flag, uri)}: not read: {skipped}", flush=True)
    unreadable += [Rejected(photo.path, photo.unreadable) for photo in found.photos if photo.unreadable]
    return storage, [photo.name for photo in found.photos if not photo.unreadable]


def _lr_folders(folders: Folders, hr: str, flags: tuple[str, str]) -> list[str]:
    """The LR folders of the HR images. Raises UserError where several belong to one HR folder."""
    ambiguous = folders.ambiguous_lr_folders()
    if ambiguous:
        raise UserError(
            f"{_named(flags[0], hr)}: {' and '.join(ambiguous)} both hold LR files of "
            f"{', '.join(hr_folders(folders.hr))}; choose: {_named(flags[0], hr)}/{hr_folders(folders.hr)[0]} "
            f"{_named(flags[1], hr)}/{ambiguous[0]}"
        )
    return folders.lr_folders_of(folders.hr)


def _below(storage: Storage, names: list[str], folders: list[str]) -> dict[str, str]:
    """Full address of each name; names in a single folder become relative to it."""
    prefix = f"{folders[0]}/" if len(folders) == 1 else ""
    return {name.removeprefix(prefix): storage.path(name) for name in names}


def _match(
    hr_paths: dict[str, str], lr_paths: dict[str, str], scale: int, folder: str, named: str
) -> tuple[list[Pair], list[Rejected]]:
    matches = lr_candidates({name: name for name in hr_paths}, {name: name for name in lr_paths}, scale)
    pairs, rejected, free = [], [], dict.fromkeys(lr_paths)
    for name in sorted(hr_paths):
        candidates = [each for each in matches[name] if each in free]
        if not candidates:
            rejected.append(Rejected(hr_paths[name], f"no LR file of this name in {folder}"))
            continue
        pairs.append(Pair(name, hr_paths[name], lr_paths[candidates[0]]))
        for each in candidates:
            del free[each]
        same = PurePosixPath(candidates[0]).name
        rejected += [Rejected(lr_paths[each], f"has the same name as {same}") for each in candidates[1:]]
    rejected += [Rejected(lr_paths[name], "no HR image of this name") for name in free]
    if not pairs:
        example = PurePosixPath(next(iter(hr_paths), "name.png")).stem
        raise UserError(
            f"{named}: no file name matches an HR image; expected names such as {example}x{scale}.png"
        )
    return pairs, rejected
