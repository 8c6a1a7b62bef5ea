"""Finds the pictures of an evaluation: originals alone, or originals and their low-resolution versions."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.photos import EXTENSIONS
from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote

HR_FOLDERS = ("hr", "gtmod12", "gt", "original", "originals", "target")
LR_FOLDERS = (
    "lrbicx{scale}",
    "lr_bicubic/x{scale}",
    "lr/x{scale}",
    "lr_x{scale}",
    "lrx{scale}",
    "x{scale}",
    "lr",
)


@dataclass(frozen=True)
class Pair:
    """An original and, where there is one, its low-resolution version; both are full addresses."""

    name: str
    hr: str
    lr: str | None


@dataclass(frozen=True)
class Refused:
    """A file that is not evaluated, and why."""

    path: str
    reason: str


def images_in(uri: str, flag: str) -> tuple[Storage, list[str]]:
    """The folder and the relative names of the pictures below it, sorted; for a file, its folder and its name.

    Raises:
        UserError: naming `flag`, when there is no such folder or file, or no picture in it.
    """
    if not is_remote(uri) and Path(uri).expanduser().is_file():
        file = Path(uri).expanduser().resolve()
        return Storage(str(file.parent)), [file.name]
    storage = Storage(uri)
    if storage.remote and _is_image(PurePosixPath(storage.uri)) and storage.exists():
        folder, _, name = storage.uri.rpartition("/")
        return Storage(folder), [name]
    if not storage.exists():
        raise UserError(f"{flag} {uri}: there is no such folder or file")
    names = [name for name in storage.files() if _is_image(PurePosixPath(name))]
    if not names:
        known = ", ".join(sorted(suffix.lstrip(".") for suffix in EXTENSIONS))
        raise UserError(f"{flag} {uri}: no pictures there (looked for {known})")
    return storage, names


def find_pairs(hr: str, lr: str | None, scale: int) -> tuple[list[Pair], list[Refused]]:
    """The pictures to evaluate, sorted by name.

    Without `lr`, a folder with originals and low-resolution files in two subfolders (`HR/ LR/`, `GTmod12/ LRbicx4/`)
    or beside each other (`name_HR.png name_LR.png`) is recognised. With `lr`, files belong together by name;
    endings such as `x4`, `_LR` and `_HR` do not count (DIV2K's `0801.png` and `0801x4.png`).

    Raises:
        UserError: a folder is missing or empty, or no original has a low-resolution file.
    """
    storage, names = images_in(hr, "--hr")
    if lr is None:
        hr_folder, lr_folder = _subfolders(names, scale)
        if hr_folder is not None and lr_folder is not None:
            originals = _below(storage, names, hr_folder)
            return _match(originals, _below(storage, names, lr_folder), scale, f"{hr}/{lr_folder}")
        if hr_folder is not None:
            names = [name for name in names if name.startswith(f"{hr_folder}/")]
        beside = _split_by_ending(storage, names)
        if beside is not None:
            originals, small, rest = beside
            pairs, refused = _match(originals, small, scale, hr)
            return pairs, refused + [Refused(path, "neither _HR nor _LR in its name") for path in rest]
        return [Pair(name, storage.path(name), None) for name in names], []
    lr_storage, lr_names = images_in(lr, "--lr")
    steps = {name.split("/")[0] for name in lr_names if "/" in name}
    inner = next((step for step in sorted(steps) if step.lower() == f"x{scale}"), None)
    small = (
        _below(lr_storage, lr_names, inner) if inner else {name: lr_storage.path(name) for name in lr_names}
    )
    if len(names) == 1 and len(small) == 1:
        return [Pair(names[0], storage.path(names[0]), next(iter(small.values())))], []
    return _match({name: storage.path(name) for name in names}, small, scale, lr)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in path.parts[-8:])


def _subfolders(names: list[str], scale: int) -> tuple[str | None, str | None]:
    """The subfolders that hold originals and low-resolution files, as they are spelled; None where there is none."""
    folders = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    spelled = {folder.lower(): folder for folder in sorted(folders)}
    hr_folder = next((spelled[folder] for folder in HR_FOLDERS if folder in spelled), None)
    candidates = (folder.format(scale=scale) for folder in LR_FOLDERS)
    return hr_folder, next((spelled[folder] for folder in candidates if folder in spelled), None)


def _below(storage: Storage, names: list[str], folder: str) -> dict[str, str]:
    prefix = f"{folder}/"
    return {name.removeprefix(prefix): storage.path(name) for name in names if name.startswith(prefix)}


def _split_by_ending(
    storage: Storage, names: list[str]
) -> tuple[dict[str, str], dict[str, str], list[str]] | None:
    """Originals, low-resolution files and the rest, where names end in _HR and _LR; else None."""
    ending = {name: _ENDING.search(PurePosixPath(name).stem) for name in names}
    originals = {
        name: storage.path(name) for name, match in ending.items() if match and match[1].lower() == "hr"
    }
    small = {name: storage.path(name) for name, match in ending.items() if match and match[1].lower() == "lr"}
    if not originals or not small:
        return None
    return originals, small, [name for name in names if name not in originals and name not in small]


_ENDING = re.compile(r"[_-](hr|lr)$", re.IGNORECASE)


def _key(name: str, scale: int) -> str:
    """What a file is called without the endings that tell the two sizes apart."""
    path = PurePosixPath(name)
    stem = re.sub(rf"(?<=.)[_-]?(x{scale}|{scale}x)$", "", path.stem, flags=re.IGNORECASE)
    stem = re.sub(r"(?<=.)[_-](hr|lr|gt|bicubic|lrbic)$", "", stem, flags=re.IGNORECASE)
    stem = re.sub(rf"(?<=.)[_-]?(x{scale}|{scale}x)$", "", stem, flags=re.IGNORECASE)
    return str(path.with_name(stem))


def _match(
    originals: dict[str, str], small: dict[str, str], scale: int, where: str
) -> tuple[list[Pair], list[Refused]]:
    by_key: dict[str, str] = {}
    refused = []
    for name in sorted(small):
        key = _key(name, scale)
        if key in by_key:
            refused.append(Refused(small[name], f"has the same name as {PurePosixPath(by_key[key]).name}"))
        else:
            by_key[key] = small[name]
    pairs = []
    for name in sorted(originals):
        # An original's own name may end in x4: the exact name wins over the shortened one.
        exact = str(PurePosixPath(name).with_suffix(""))
        partner = by_key.pop(exact, None) or by_key.pop(_key(name, scale), None)
        if partner is None:
            refused.append(Refused(originals[name], f"no low-resolution file of this name in {where}"))
        else:
            pairs.append(Pair(name, originals[name], partner))
    refused += [Refused(path, "no original of this name") for path in by_key.values()]
    if not pairs:
        example = PurePosixPath(next(iter(originals), "name.png")).stem
        raise UserError(
            f"{where}: no file there belongs to an original by name; expected {example}x{scale}.png or so"
        )
    return pairs, refused
