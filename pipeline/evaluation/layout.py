"""Finds the images of an evaluation: HR images alone, or HR images with their LR files."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.ingest.decoding import EXTENSIONS
from pipeline.data.ingest.layout import (
    Folders,
    hr_folders,
    is_marked_hr,
    lr_candidates,
    lr_files,
    lr_next_to_hr,
    split_folders,
)
from pipeline.errors import UserError
from pipeline.storage import Storage, is_remote


@dataclass(frozen=True)
class Pair:
    """An HR image and, if it exists, its LR file; both are full addresses."""

    name: str
    hr: str
    lr: str | None


@dataclass(frozen=True)
class Rejected:
    """A file that is not evaluated, and the reason."""

    path: str
    reason: str


def images_in(uri: str, flag: str) -> tuple[Storage, list[str]]:
    """The folder and the relative names of the images below it, sorted; for a file, its folder and its name.

    Raises:
        UserError: naming `flag`, if the folder or file does not exist, or has no images.
    """
    if not is_remote(uri) and Path(uri).expanduser().is_file():
        file = Path(uri).expanduser().resolve()
        return Storage(str(file.parent)), [file.name]
    storage = Storage(uri)
    if storage.remote and _is_image(PurePosixPath(storage.uri)) and storage.exists():
        folder, _, name = storage.uri.rpartition("/")
        return Storage(folder), [name]
    if not storage.exists():
        raise UserError(f"{flag} {uri}: no such folder or file")
    names = [name for name in storage.files() if _is_image(PurePosixPath(name))]
    if not names:
        known = ", ".join(sorted(suffix.lstrip(".") for suffix in EXTENSIONS))
        raise UserError(f"{flag} {uri}: no images (suffixes: {known})")
    return storage, names


def find_pairs(hr: str, lr: str | None, scale: int) -> tuple[list[Pair], list[Rejected]]:
    """The images to evaluate, sorted by name.

    Folder and file names are matched by `pipeline.data.ingest.layout`, as in ingest. If only some subfolders of `hr`
    are HR folders, the others are not evaluated; without `lr`, the LR folder next to them is used. The choice is
    printed.

    Raises:
        UserError: a folder is missing or empty, no HR file has an LR file, or the LR files are ambiguous.
    """
    storage, names = images_in(hr, "--hr")
    folders = split_folders(names, scale)
    if folders is not None:
        names = folders.hr
    hr_paths = _below(storage, names, hr_folders(names) if folders is not None else [])
    if lr is not None:
        lr_storage, lr_names = images_in(lr, "--lr")
        lr_paths = _below(lr_storage, lr_files(lr_names, scale), [])
        if len(hr_paths) == len(lr_paths) == 1:
            (name, path), (lr_path,) = *hr_paths.items(), lr_paths.values()
            return [Pair(name, path, lr_path)], []
        return _match(hr_paths, lr_paths, scale, lr)
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
            lr_paths = _below(storage, [name for folder in chosen for name in folders.lr[folder]], [])
            return _match(hr_paths, lr_paths, scale, f"{hr}/{chosen[0]}")
    adjacent = lr_next_to_hr(hr_paths)
    unmarked = [name for name, other in adjacent.items() if not is_marked_hr(other)]
    if unmarked:
        raise UserError(
            f"--hr {hr}: {unmarked[0]} is next to {adjacent[unmarked[0]]} and by its name the same image at another "
            f"size ({len(unmarked)} such files); move LR files to a separate folder and pass it as --lr, or rename them"
        )
    if adjacent:
        marked = {name: path for name, path in hr_paths.items() if is_marked_hr(name)}
        lr_paths = {name: hr_paths[name] for name in adjacent}
        pairs, rejected = _match(marked, lr_paths, scale, hr)
        rest = [path for name, path in hr_paths.items() if name not in marked and name not in lr_paths]
        return pairs, rejected + [Rejected(path, "neither HR nor LR in its name") for path in rest]
    return [Pair(name, path, None) for name, path in hr_paths.items()], []


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
    """Full address of each name; names in a single folder become relative to it."""
    prefix = f"{folders[0]}/" if len(folders) == 1 else ""
    return {name.removeprefix(prefix): storage.path(name) for name in names}


def _match(
    hr_paths: dict[str, str], lr_paths: dict[str, str], scale: int, folder: str
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
            f"{folder}: no file name matches an HR image; expected names such as {example}x{scale}.png"
        )
    return pairs, rejected
