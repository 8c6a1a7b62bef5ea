"""The generator that a finished run wants registered: kept in the run's folder until the store has it.

    tracking/candidate/candidate.json   what is to be registered, written last
    tracking/candidate/*.png            the card's pictures and its example

So a store that is away when training ends costs nothing: a later command registers what lies here.
"""

import hashlib
import io
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import UserError, without_secrets
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.model_files import ModelCard
from pipeline.tracking.records import FOLDER, png
from pipeline.tracking.registry import RegisteredVersion, log_generator, register_generator
from pipeline.tracking.runs import TrackedRun

PLACE = f"{FOLDER}/candidate"
FILE = f"{PLACE}/candidate.json"
EXAMPLE = f"{PLACE}/example.png"


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator of the run, and what it achieved."""

    file: str
    """Its .safetensors file, below the run's folder."""
    sha256: str
    """Of the file."""
    step: int
    metrics: dict[str, float]
    """Validation metrics."""


@dataclass(frozen=True)
class Candidate:
    """All that is needed to register a run's generator at any later time."""

    model_name: str
    metric: str
    """Guards `champion`."""
    generator: TrainedGenerator
    earlier: tuple[TrainedGenerator, ...]
    """Results of earlier stages: logged with their metrics, to be compared, and not registered."""
    evaluation_set: str
    """Digest of the photographs that the metrics were measured on."""
    card: ModelCard

    def save(self, run: Storage) -> None:
        """Writes it into the run's folder, whole or not at all, without secrets. Raises OSError."""
        run.remove(PLACE)
        for index, picture in enumerate(self.card.pictures.values()):
            run.write_bytes(_picture_file(index), png(picture))
        if self.card.example is not None:
            run.write_bytes(EXAMPLE, png(self.card.example))
        content = {
            "model_name": self.model_name,
            "metric": self.metric,
            "generator": asdict(self.generator),
            "earlier": [asdict(each) for each in self.earlier],
            "evaluation_set": self.evaluation_set,
            "config_text": without_secrets(self.card.config_text),
            "data_sha256": self.card.data_sha256,
            "data": self.card.data,
            "licence": self.card.licence,
            "pictures": list(self.card.pictures),
            "example": self.card.example is not None,
        }
        run.write_bytes(FILE, json.dumps(content, indent=2, ensure_ascii=False).encode())

    @staticmethod
    def load(run: Storage) -> "Candidate | None":
        """The run's candidate; None where nothing waits to be registered. Raises UserError for a damaged one."""
        try:
            text = run.read_bytes(FILE)
        except FileNotFoundError:
            return None
        try:
            content: dict[str, Any] = json.loads(text)
            titles = enumerate(content["pictures"])
            return Candidate(
                model_name=content["model_name"],
                metric=content["metric"],
                generator=TrainedGenerator(**content["generator"]),
                earlier=tuple(TrainedGenerator(**each) for each in content["earlier"]),
                evaluation_set=content["evaluation_set"],
                card=ModelCard(
                    config_text=content["config_text"],
                    data_sha256=content["data_sha256"],
                    data=content.get("data", ""),  # absent in candidates of earlier releases
                    licence=content["licence"],
                    pictures={title: _image(run, _picture_file(index)) for index, title in titles},
                    example=_image(run, EXAMPLE) if content["example"] else None,
                ),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{run.path(PLACE)}: damaged ({error}); start the training again") from None

    @staticmethod
    def discard(run: Storage) -> None:
        """Forgets it: the store has it."""
        run.remove(PLACE)


def trained_generator(run: Storage, file: str, step: int, metrics: dict[str, float]) -> TrainedGenerator:
    """Describes a generator's file as it is now. Raises OSError."""
    return TrainedGenerator(file, hashlib.sha256(run.read_bytes(file)).hexdigest(), step, metrics)


def register_candidate(run: Storage, tracked: TrackedRun, candidate: Candidate) -> RegisteredVersion:
    """Logs and registers what a run made; doing it again gives the same version.

    Args:
        run: the run's folder, on this machine or under an s3:// prefix.
        tracked: the open run.
        candidate: what to register.

    Raises:
        UserError: the store is away or refuses, or a file is damaged; run the same command again.
    """
    config = TrackingConfig(model_name=candidate.model_name, metric=candidate.metric)
    plain = replace(candidate.card, pictures={})
    with tempfile.TemporaryDirectory(prefix="esrgan-generator-") as folder:
        for earlier in candidate.earlier:
            path = _fetch(run, earlier, Path(folder))
            log_generator(
                tracked, config, path, earlier.step, earlier.metrics, candidate.evaluation_set, plain
            )
        best = candidate.generator
        return register_generator(
            tracked,
            config,
            _fetch(run, best, Path(folder)),
            step=best.step,
            metrics=best.metrics,
            evaluation_set=candidate.evaluation_set,
            card=candidate.card,
        )


def _fetch(run: Storage, generator: TrainedGenerator, folder: Path) -> Path:
    """Brings a generator's file here, wherever the run lies. Raises UserError."""
    where = f"{run.path(generator.file)}: its generator cannot be registered"
    try:
        content = run.read_bytes(generator.file)
    except FileNotFoundError:
        raise UserError(f"{where}, the file is gone") from None
    if hashlib.sha256(content).hexdigest() != generator.sha256:
        raise UserError(f"{where}, the file is damaged")
    path = folder / "generator.safetensors"
    path.write_bytes(content)
    return path


def _picture_file(index: int) -> str:
    return f"{PLACE}/picture-{index}.png"


def _image(run: Storage, file: str) -> np.ndarray:
    with Image.open(io.BytesIO(run.read_bytes(file))) as image:
        return np.asarray(image.convert("RGB"))
