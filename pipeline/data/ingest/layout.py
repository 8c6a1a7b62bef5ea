"""Which files of a folder are HR images and which are LR, by name alone: one rule for ingest and evaluation.

A folder is an HR folder when a word of its name is HR, GT, GTmod12 or HQ (or its whole name original or target), and an
LR folder when one begins with LR or LQ (LRbicx4): `DIV2K_train_HR` with `DIV2K_train_LR_bicubic/X4`, `train/HR` with
`train/LR`, `GT` with `LQ`. Case does not matter. Files are paired by what is left of their paths without these words.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import UserError

_HR_WORD = re.compile(r"hr|hq|gt|gtmod\d+")
_LR_WORD = re.compile(r"(lr|lq)\w*|biclr(x[2348])?")
_HR_NAMES = ("original", "originals", "target")
# Versions of the same images in sibling folders: the first of these is used.
_VERSIONS = (re.compile(r"gtmod\d+"), re.compile(r"hr|gt|hq"), re.compile("|".join(_HR_NAMES)))
_SCALE = re.compile(r"x([2348])$|^([2348])x$")
_SCALE_ENDING = r"[_-]?(x[2348]|[2348]x)$"
_LR_ENDING = r"[_-](lr|lq|lrbi|lrbic|biclr|bicubic)$"
_HR_ENDING = r"[_-](hr|hq|gt)$"
_VALIDATION, _TRAINING = {"val", "valid", "validation", "test"}, {"train", "training"}


@dataclass(frozen=True)
class Folders:
    """The files of a folder whose subfolders are HR and, perhaps, LR folders. Names are relative, and sorted."""

    hr: list[str]
    """Files in HR folders, one version of each image."""
    lr: dict[str, list[str]]
    """Files in LR folders, by folder; the folders of the scale, or of no scale that their names give."""
    other_lr: dict[str, list[str]]
    """Files in LR folders of other scales."""
    versions: dict[str, list[str]]
    """Files in HR folders that hold other versions of `hr`, by folder."""
    rest: list[str]
    """Files in neither."""

    def lr_folders_of(self, hr: Iterable[str]) -> list[str]:
        """Folders in `lr` that belong to the folders of these HR files."""
        groups = {_Location(name).group for name in hr}
        return sorted(folder for folder, names in self.lr.items() if _Location(names[0]).group in groups)

    def ambiguous_lr_folders(self) -> list[str]:
        """LR folders that belong to the same HR folder; empty where the choice is clear."""
        by_group = defaultdict(list)
        for folder, names in self.lr.items():
            by_group[_Location(names[0]).group].append(folder)
        return next((folders for folders in by_group.values() if len(folders) > 1), [])


class _Location:
    """Location of a file, parsed from the folders of its relative name."""

    def __init__(self, name: str) -> None:
        path = PurePosixPath(name)
        parts = path.parts[:-1]
        words = [re.split(r"[\W_]+", part.lower()) for part in parts]
        roles = [_role(each) for each in words]
        scales = [next((int(m[1] or m[2]) for w in each if (m := _SCALE.search(w))), None) for each in words]
        is_scale = [bool(len(each) == 1 and _SCALE.fullmatch(each[0])) for each in words]
        first = next((index for index, (role, _) in enumerate(roles) if role), None)
        self.role: str | None = None
        if first is not None:
            self.role = roles[first][0]
        elif any(is_scale):
            first, self.role = is_scale.index(True), "scale"
        end = 0 if first is None else first + 1
        if end and self.role != "hr" and is_scale[end : end + 1] == [True]:
            end += 1
        self.folder = "/".join(parts[:end])
        """Up to the part that names the role, and a scale's folder in it."""
        self.scale = next((scale for scale in reversed(scales) if scale), None)
        kept = [
            "_".join(each[:at]) if role else "" if scale else part.lower()
            for part, each, (role, at), scale in zip(parts, words, roles, is_scale, strict=True)
        ]
        self.group = "/".join(part for part in kept[:end] if part)
        """The same for an HR folder and its LR folders."""
        self.address = "/".join(part for part in kept if part)
        """The same for the folder of an HR file and that of its LR file."""
        self.words = {word for each in words for word in each}
        # `HR_sub` next to `HR` contains other images, not another version.
        alone = first is not None and len(words[first]) == roles[first][1] + 1
        self.version = (
            next((order for order, form in enumerate(_VERSIONS) if form.fullmatch(words[first][-1])), None)
            if alone and first is not None and self.role == "hr"
            else None
        )


def split_folders(names: Iterable[str], scale: int) -> Folders | None:
    """HR and LR files by the names of their folders; None where no folder is an HR folder."""
    locations = {name: _Location(name) for name in sorted(names)}
    groups = {location.group for location in locations.values() if location.role == "hr"}
    if not groups:
        return None
    best: dict[str, tuple[int, str]] = {}
    for location in locations.values():
        if location.version is not None:
            best[location.group] = min(
                best.get(location.group, (99, "")), (location.version, location.folder)
            )
    # Some sets keep an HR folder for every scale.
    scaled = {
        location.group for location in locations.values() if location.role == "hr" and location.scale == scale
    }
    hr, rest = [], []
    lr: dict[str, list[str]] = defaultdict(list)
    other_lr: dict[str, list[str]] = defaultdict(list)
    versions: dict[str, list[str]] = defaultdict(list)
    for name, location in locations.items():
        if location.role == "lr" or (location.role == "scale" and location.group in groups):
            (lr if location.scale in (None, scale) else other_lr)[location.folder].append(name)
        elif location.role != "hr":
            rest.append(name)
        elif (location.version is not None and best[location.group][1] != location.folder) or (
            location.group in scaled and location.scale not in (None, scale)
        ):
            versions[location.folder].append(name)
        else:
            hr.append(name)
    # A folder that names the scale is preferred to one that names none.
    exact = {_Location(files[0]).group for files in lr.values() if _Location(files[0]).scale == scale}
    for folder in [folder for folder, files in lr.items() if _Location(files[0]).scale is None]:
        if _Location(lr[folder][0]).group in exact:
            other_lr[folder] = lr.pop(folder)
    return Folders(hr, dict(lr), dict(other_lr), dict(versions), rest)


def hr_folders(names: Iterable[str]) -> list[str]:
    """The HR folders of files in them."""
    return sorted({_Location(name).folder for name in names})


def split_parts(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files in HR folders for training and for validation, where both are there; otherwise two empty lists."""
    locations = {name: _Location(name) for name in names}
    validation = [name for name, location in locations.items() if location.words & _VALIDATION]
    training = [
        name for name, location in locations.items() if location.words & _TRAINING and name not in validation
    ]
    return (training, validation) if training and validation else ([], [])


def lr_files(names: Iterable[str], scale: int) -> list[str]:
    """What of a folder of LR files may be paired: without HR folders in it, and without other scales."""
    locations = {name: _Location(name) for name in names}
    has_lr = any(location.role in ("lr", "scale") for location in locations.values())
    fitting = [
        name
        for name, location in locations.items()
        if not (has_lr and location.role == "hr") and location.scale in (None, scale)
    ]
    return fitting or list(locations)


def lr_next_to_hr(names: Iterable[str]) -> dict[str, str]:
    """LR files in the folder of their HR file, and that HR file: `ax4.png`: `a.png`, `a_LR.png`: `a_HR.png`."""
    hr: dict[tuple[PurePosixPath, str], str] = {}
    lr: dict[str, tuple[PurePosixPath, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        stem = path.stem.lower()
        short = re.sub(rf"(?<=.){_SCALE_ENDING}", "", stem)
        marked_hr = re.sub(rf"(?<=.){_HR_ENDING}", "", short)
        marked_lr = re.sub(rf"(?<=.){_LR_ENDING}", "", short)
        if marked_hr != short or stem == marked_lr:
            hr.setdefault((path.parent, marked_hr), name)
        else:
            lr[name] = (path.parent, marked_lr)
    return {name: hr[location] for name, location in lr.items() if location in hr}


def is_marked_hr(name: str) -> bool:
    """Whether a file name ends as HR files are marked (`_HR`, `_GT`, `_HR_x4`)."""
    stem = re.sub(rf"(?<=.){_SCALE_ENDING}", "", PurePosixPath(name).stem.lower())
    return re.search(_HR_ENDING, stem) is not None


def require_marked_hr(adjacent: Mapping[str, str], where: str, advice: str) -> None:
    """Raises UserError, with `where` and `advice`, unless every HR file in `lr_next_to_hr`'s result is marked."""
    unmarked = [lr for lr, hr in adjacent.items() if not is_marked_hr(hr)]
    if unmarked:
        raise UserError(
            f"{where}: {unmarked[0]} is next to {adjacent[unmarked[0]]} and by its name the same image at another "
            f"size ({len(unmarked)} such files); move LR files to a separate folder {advice}, or rename them"
        )


def lr_candidates(hr: Mapping[str, str], lr: Mapping[str, str], scale: int) -> dict[str, list[str]]:
    """LR files that may belong to each HR file, both as {id: relative name}; more than one where it is not clear.

    The same name in the same folder comes first, then the name with an ending (`x4`, `_x4`, `_4x`, `_LR`, `_bicLRx4`,
    `_LRBI_x4`), then such a name in any folder, where only one HR file has it. The words for HR, LR and the scale in
    folder names do not count, nor do extensions and case.
    """
    exact, short, anywhere = defaultdict(list), defaultdict(list), defaultdict(list)
    for key, name in sorted(lr.items(), key=lambda item: item[1]):
        folder, stem = _Location(name).address, _stem(name)
        exact[folder, stem].append(key)
        short[folder, _short(stem, scale)].append(key)
        for each in {stem, _short(stem, scale)}:
            anywhere[each].append(key)
    names = {key: (_Location(name).address, _stem(name)) for key, name in hr.items()}
    matches = {key: exact.get(location, []) for key, location in names.items()}
    taken = {each for candidates in matches.values() for each in candidates}
    count: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for location in names.values():
        count[location[1]].add(location)

    def free(candidates: list[str]) -> list[str]:
        return [each for each in candidates if each not in taken]

    for key, (folder, stem) in names.items():
        if not matches[key]:
            near = free(short.get((folder, stem), [])) or free(short.get((folder, _short(stem, scale)), []))
            far = free(anywhere.get(stem, [])) if len(count[stem]) == 1 else []
            matches[key] = near or far
    return matches


def _role(words: list[str]) -> tuple[str | None, int]:
    """hr or lr, and the index of the word that names it; (None, 0) if no word does."""
    if len(words) == 1 and words[0] in _HR_NAMES:
        return "hr", 0
    for index, word in enumerate(words):
        if _LR_WORD.fullmatch(word):
            return "lr", index
        if _HR_WORD.fullmatch(word):
            return "hr", index
    return None, 0


def _stem(name: str) -> str:
    return PurePosixPath(name).stem.lower()


def _short(stem: str, scale: int) -> str:
    """A file's name without the endings that distinguish the two sizes."""
    scale_ending = rf"(?<=.)[_-]?(x{scale}|{scale}x)$"
    stem = re.sub(scale_ending, "", stem)
    stem = re.sub(rf"(?<=.)({_LR_ENDING}|{_HR_ENDING})", "", stem)
    return re.sub(scale_ending, "", stem)
