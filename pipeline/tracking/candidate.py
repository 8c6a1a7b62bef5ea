"""The generator of a finished run, kept in the run's folder until it is registered."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.errors import UserError, without_secrets
from pipeline.imaging.arrays import encoded
from pipeline.run_folder import CANDIDATE, CandidateDescription, TrainedGenerator
from pipeline.storage import Storage
from pipeline.tracking.spool import FOLDER, from_png

CANDIDATE_FOLDER = f"{FOLDER}/candidate"


@dataclass(frozen=True)
class Candidate:
    """Everything that is needed to register a run's generator at any later time."""

    description: CandidateDescription
    """`images` is set when it is saved."""
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Title to (H, W, 3) uint8 image of the model card; it begins with the input, upscaled by pixel repetition."""

    def save(self, run: Storage) -> None:
        """Writes it atomically into the run's folder, without secrets. Raises OSError."""
        run.remove(CANDIDATE_FOLDER)
        for index, image in enumerate(self.images.values()):
            run.write_bytes(_image_file(index), encoded(image, "PNG"))
        description = replace(
            self.description,
            config_text=without_secrets(self.description.config_text),
            images=list(self.images),
        )
        CANDIDATE.write(run, description)

    @staticmethod
    def load(run: Storage) -> "Candidate | None":
        """The run's candidate; None if there is none. Raises UserError if it is corrupt."""
        saved = CANDIDATE.read(run)
        if saved is None:
            return None
        try:
            images = {
                title: from_png(run.read_bytes(_image_file(index)))
                for index, title in enumerate(saved.images)
            }
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{run.path(CANDIDATE_FOLDER)}: corrupt ({error}); {CANDIDATE.remedy}") from None
        return Candidate(saved, images)

    @staticmethod
    def discard(run: Storage) -> None:
        """Deletes the saved candidate (already registered)."""
        run.remove(CANDIDATE_FOLDER)


def trained_generator(run: Storage, file: str, step: int, metrics: dict[str, float]) -> TrainedGenerator:
    """Describes a generator's file by its present content. Raises OSError."""
    return TrainedGenerator(file, hashlib.sha256(run.read_bytes(file)).hexdigest(), step, metrics)


def _image_file(index: int) -> str:
    return f"{CANDIDATE_FOLDER}/image-{index}.png"
