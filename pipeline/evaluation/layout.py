"""Finds the pictures of an evaluation: originals alone, or originals and their low-resolution versions."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.ingest.decoding import EXTENSIONS
from pipeline.data.ingest.layout import (
    Folders,
    hr_folders,
    is_marked_hr,
    lr_beside_hr,
    lr_candidates,
    lr_files,
    split_folders,
)
from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote


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

    The words for HR and LR in folder and file names are those of `pipeline.data.ingest.layout`, as in ingest. Where
    only some subfolders of `hr` are HR folders, the rest is not evaluated; without `lr`, the LR folder beside them is
    used. A line is printed where there was a choice.

    Raises:
        UserError: a folder is missing or empty, no HR file has an LR file, or it is not clear which LR files belong.
    """
    storage, names = images_in(hr, "--hr")
    folders = split_folders(names, scale)
    if folders is not None:
        names = folders.hr
    originals = _below(storage, names, hr_folders(names) if folders is not None else [])
    if lr is not None:
        lr_storage, lr_names = images_in(lr, "--lr")
        small = _below(lr_storage, lr_files(lr_names, scale), [])
        if len(originals) == len(small) == 1:
            (name, path), (low,) = *originals.items(), small.values()
            return [Pair(name, path, low)], []
        return _match(originals, small, scale, lr)
    if folders is not None:
        chosen = _lr_folders(folders, hr)
        skipped = sorted({*folders.other_lr, *folders.versions}) + (["other files"] if folders.rest else [])
        print(
            f"note: --hr {hr}: HR images from {', '.join(hr_folders(names))}; "
            + (f"LR images from {', '.join(chosen)}" if chosen else "LR images made by bicubic")
            + (f"; skipped: {', '.join(skipped)}" if skipped else ""),
            flush=True,
        )
        if chosen:
            small = _below(storage, [name for folder in chosen for name in folders.lr[folder]], [])
            return _match(originals, small, scale, f"{hr}/{chosen[0]}")
    beside = lr_beside_hr(originals)
    unmarked = [name for name, other in beside.items() if not is_marked_hr(other)]
    if unmarked:
        raise UserError(
            f"--hr {hr}: {unmarked[0]} is next to {beside[unmarked[0]]} and by its name the same image at another size "
            f"({len(unmarked)} such files); move LR files to a folder of their own and give it as --lr, or rename them"
        )
    if beside:
        marked = {name: path for name, path in originals.items() if is_marked_hr(name)}
        small = {name: originals[name] for name in beside}
        pairs, refused = _match(marked, small, scale, hr)
        rest = [path for name, path in originals.items() if name not in marked and name not in small]
        return pairs, refused + [Refused(path, "neither HR nor LR in its name") for path in rest]
    return [Pair(name, path, None) for name, path in originals.items()], []


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in path.parts[-8:])


def _lr_folders(folders: Folders, hr: str) -> list[str]:
    """The LR folders of the HR images. Raises UserError where several belong to one HR folder."""
    rivals = folders.rivals()
    if rivals:
        raise UserError(
            f"--hr {hr}: {' and '.join(rivals)} both hold LR files of {', '.join(hr_folders(folders.hr))}; choose: "
            f"--hr {hr}/{hr_folders(folders.hr)[0]} --lr {hr}/{rivals[0]}"
        )
    return folders.lr_folders_of(folders.hr)


def _below(storage: Storage, names: list[str], folders: list[str]) -> dict[str, str]:
    """Full address of each name; the names are relative to the folder, where there is one."""
    prefix = f"{folders[0]}/" if len(folders) == 1 else ""
    return {name.removeprefix(prefix): storage.path(name) for name in names}


def _match(
    originals: dict[str, str], small: dict[str, str], scale: int, where: str
) -> tuple[list[Pair], list[Refused]]:
    found = lr_candidates({name: name for name in originals}, {name: name for name in small}, scale)
    pairs, refused, free = [], [], dict.fromkeys(small)
    for name in sorted(originals):
        candidates = [each for each in found[name] if each in free]
        if not candidates:
            refused.append(Refused(originals[name], f"no low-resolution file of this name in {where}"))
            continue
        pairs.append(Pair(name, originals[name], small[candidates[0]]))
        for each in candidates:
            del free[each]
        same = PurePosixPath(candidates[0]).name
        refused += [Refused(small[each], f"has the same name as {same}") for each in candidates[1:]]
    refused += [Refused(small[name], "no original of this name") for name in free]
    if not pairs:
        example = PurePosixPath(next(iter(originals), "name.png")).stem
        raise UserError(
            f"{where}: no file there belongs to an original by name; expected {example}x{scale}.png or so"
        )
    return pairs, refused
