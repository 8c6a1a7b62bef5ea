"""Which images are upscaled, and to which outputs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.ingest.image_set import images_in
from pipeline.data.ingest.sources import Listing, PhotoFile
from pipeline.errors import UserError
from pipeline.evaluation.image_files import SUFFIXES
from pipeline.storage import Storage, is_remote


@dataclass(frozen=True)
class Task:
    """An image and its output's name below the output folder."""

    photo: PhotoFile
    target: str
    form: str
    """png, jpg or webp."""


def plan(source: str, output: str, form: str) -> tuple[Storage, list[Task]]:
    """Output folder and tasks: relative names are kept, and the suffix becomes the format's.

    Images whose outputs would have the same name keep their own suffix in front of the new one. Prints what of the
    folder is skipped. An output with the suffix of an image is the file of a single input.

    Args:
        source: a file, a folder or a prefix.
        output: a folder, a prefix or, for a single input, a file.
        form: png, jpg, webp, or auto: the input's, or png where the input has another one.

    Raises:
        UserError: no such folder or file, no images in it, or an output would replace an input.
    """
    folder, found = images_in(source, "--input")
    if is_file(output):
        return _plan_file(folder, found, source, output, form)
    target = Storage(output)
    if target.uri == folder.uri:
        raise UserError(
            f"--output {output}: is the input's folder; choose another, so that nothing is overwritten"
        )
    # Outputs of an earlier run may be below the input folder.
    prefix = f"{folder.uri}/"
    inside = f"{target.uri}/".removeprefix(prefix) if target.uri.startswith(prefix) else None

    def outside(name: str) -> bool:
        return inside is None or not name.startswith(inside)

    if skipped := found.skipped_note(outside):
        print(f"note: --input {source}: not read: {skipped}", flush=True)
    photos = {photo.name: photo for photo in found.photos if outside(photo.name)}
    if not photos:
        raise UserError(f"--input {source}: no images outside the output folder")
    forms = {name: _form_of(name) or "png" if form == "auto" else form for name in photos}
    targets = _output_names({name: SUFFIXES[each] for name, each in forms.items()})
    tasks = [Task(photo, targets[name], forms[name]) for name, photo in photos.items()]
    inputs = {photo.path for photo in photos.values()}
    for task in tasks:
        if target.path(task.target) in inputs:
            raise UserError(
                f"--output {output}: the output of {task.photo.name} would replace the input "
                f"{target.path(task.target)}; choose another folder"
            )
    return target, tasks


def _plan_file(
    folder: Storage, found: Listing, source: str, output: str, form: str
) -> tuple[Storage, list[Task]]:
    if folder.uri == Storage(source).uri:
        raise UserError(f"--output {output}: a file, but --input is a folder; give a folder")
    chosen = str(_form_of(output))
    if form not in ("auto", "png", chosen):
        raise UserError(f"--output {output}: the suffix is of another format than --format {form}")
    parent, _, name = output.rpartition("/")
    target, (photo,) = Storage(parent or ("/" if output.startswith("/") else ".")), found.photos
    if target.path(name) == photo.path:
        raise UserError(f"--output {output}: is the input; choose another name")
    return target, [Task(photo, name, chosen)]


def _form_of(name: str) -> str | None:
    """png, jpg or webp, by the suffix of a file's name; None for others."""
    suffix = PurePosixPath(name).suffix.lower()
    return {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".webp": "webp"}.get(
        suffix
    )


def is_file(output: str) -> bool:
    """Whether an output is meant as a file: the suffix of an image, and no folder of this name."""
    return _form_of(output) is not None and not (not is_remote(output) and Path(output).expanduser().is_dir())


def _output_names(suffixes: Mapping[str, str]) -> dict[str, str]:
    """A different output name for each input with its new suffix; they depend on the set, not on the order."""
    names = list(suffixes)
    whole: set[str] = set()
    while True:
        outputs = {
            name: f"{name if name in whole else PurePosixPath(name).with_suffix('')}{suffixes[name]}"
            for name in names
        }
        counts = Counter(outputs.values())
        # a.jpg.png gives a.jpg.png, and so does a.jpg next to a.png: names that become whole can collide again.
        shared = {name for name, output in outputs.items() if counts[output] > 1} - whole
        if not shared:
            return outputs
        whole |= shared
