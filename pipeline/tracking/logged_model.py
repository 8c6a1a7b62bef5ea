"""Logs a generator as an MLflow model: the files that MLflow needs to serve it, a model card, and its metrics."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from pipeline.errors import without_secrets
from pipeline.model import RRDBNet, decode_generator, generator_sha256, rrdbnet
from pipeline.model.export import export_onnx
from pipeline.model.weights import architecture
from pipeline.run_folder import TrainedGenerator
from pipeline.tracking.candidate import Candidate
from pipeline.tracking.model_card import Usage, card_text, image_file, set_of
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.upload import DIGEST_CHARACTERS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

ONNXRUNTIME = "onnxruntime>=1.23"
AUTO_TILE = -1  # the default of `tile` in serving_model.py
SERVING_CODE = Path(__file__).with_name("serving_model.py")
WEIGHTS = "generator.safetensors"
SHA_TAG, SET_TAG = "esrgan.generator_sha256", "esrgan.evaluation_set"
SPEED_PX = 64
EXAMPLE_PX = (24, 32)  # smaller than the input in a validation image


@dataclass(frozen=True)
class LoggedGenerator:
    """A generator that is logged as an MLflow model."""

    model: LoggedModel
    sha256: str
    """Of the weights."""
    description: str
    """The model card for the registry's page."""


def log_model(
    client: MlflowClient, tracked: TrackedRun, candidate: Candidate, trained: TrainedGenerator, content: bytes
) -> LoggedGenerator:
    """Logs a generator with its metrics, or finds the model logged before; an interrupted upload is repeated.

    Args:
        client: of the tracking server.
        tracked: the run.
        candidate: what is to be registered; the source of the model card.
        trained: its generator, or one of an earlier stage.
        content: of the generator's .safetensors file.
    """
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    facts, step = candidate.description, trained.step
    generator, _ = decode_generator(content, trained.file)
    example = input_example(candidate.images, generator.scale)
    if trained != facts.generator:
        candidate = replace(candidate, images={})
    sha256 = generator_sha256(generator.state_dict())
    origin = {
        "step": step,
        "run_id": tracked.run_id,
        "generator_sha256": sha256,
        **({"data": facts.data} if facts.data else {}),
        "data_sha256": facts.data_sha256,
        "evaluation_set": facts.evaluation_set,
        **{key: without_secrets(value) for key, value in facts.initial.items()},
    }
    query = f"tags.`{SHA_TAG}` = '{sha256}' AND source_run_id = '{tracked.run_id}'"
    logged = client.search_logged_models([tracked.experiment_id], query, max_results=1)
    if logged:
        model = logged[0]
    else:
        model = client.create_logged_model(
            tracked.experiment_id,
            name=f"generator-{step:08d}",
            source_run_id=tracked.run_id,
            tags={SHA_TAG: sha256, SET_TAG: facts.evaluation_set},
            params={"step": str(step)},
            model_type="super-resolution",
        )
    usage = Usage(without_secrets(tracked.uri), model.model_id, _speed(generator))
    # MLflow's page cannot show the model's own files in a description.
    description = card_text(candidate, trained, origin, generator, usage, embed_images=False)
    if model.status == "READY":
        return LoggedGenerator(model, sha256, description)
    outputs = client.get_run(tracked.run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        # MLflow rejects a second link.
        client.log_outputs(tracked.run_id, [LoggedModelOutput(model.model_id, step=step)])
    identity = Model(
        artifact_path=model.artifact_location,
        run_id=tracked.run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
    )
    with tempfile.TemporaryDirectory(prefix="esrgan-model-") as folder:
        files, text = Path(folder) / "model", card_text(candidate, trained, origin, generator, usage)
        write_model(files, generator, content, candidate, text, example, origin, identity)
        client.log_model_artifacts(model.model_id, str(files))
    data = {"dataset_name": "evaluation-set", "dataset_digest": facts.evaluation_set[:DIGEST_CHARACTERS]}
    on_other_sets: dict[str, str] = {}
    points = [
        Metric(
            key,
            value,
            model.creation_timestamp,
            step,
            model_id=model.model_id,
            **(data if set_of(key) == set_of(facts.metric) else on_other_sets),
        )
        for key, value in trained.metrics.items()
    ]
    if points:
        client.log_batch(tracked.run_id, metrics=points)
    return LoggedGenerator(client.finalize_logged_model(model.model_id, "READY"), sha256, description)


def write_model(
    folder: Path,
    generator: RRDBNet,
    content: bytes,
    candidate: Candidate,
    text: str,
    example: np.ndarray,
    origin: Mapping[str, object],
    identity: Model,
) -> None:
    """Writes a pyfunc model "from code": no pickle, any image size, loads without this project.

    Args:
        folder: a folder to be created.
        generator, content: the network, and its .safetensors file.
        candidate, text: what is to be registered, and the model card in Markdown.
        example: see `input_example`.
        origin: small values for MLflow's metadata.
        identity: MLflow's ids of the logged model.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory(prefix="esrgan-model-") as name:
        parts = Path(name)
        (parts / "architecture.json").write_text(json.dumps(architecture(generator), indent=2) + "\n")
        (parts / WEIGHTS).write_bytes(content)
        export_onnx(generator, parts / "generator.onnx")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(SERVING_CODE),
            artifacts={
                "architecture": str(parts / "architecture.json"),
                "weights": str(parts / WEIGHTS),
                "onnx": str(parts / "generator.onnx"),
                "code": rrdbnet.__file__,
            },
            signature=_signature(),
            input_example=example[None],
            model_config={"device": "auto"},
            # Without torch, whose wheels bring CUDA (4 GB): it is used where it is installed.
            pip_requirements=[
                *(f"{name}=={metadata.version(name)}" for name in ("numpy", "pillow")),
                ONNXRUNTIME,
            ],
            metadata=dict(origin),
            mlflow_model=identity,
        )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(without_secrets(candidate.description.config_text), encoding="utf-8")
    for index, image in enumerate(candidate.images.values()):
        Image.fromarray(image).save(folder / image_file(index))


def _speed(generator: RRDBNet) -> str:
    """Time for a megapixel of output on this machine's CPU, measured once on a small image."""
    lr = np.zeros((SPEED_PX, SPEED_PX, 3), np.uint8)
    upscale_8bit = rrdbnet.upscale_8bit
    with torch.inference_mode():
        upscale_8bit(generator, torch.from_numpy(lr[None, :8, :8]))
        start = time.perf_counter()
        upscale_8bit(generator, torch.from_numpy(lr[None]))
    megapixels = (SPEED_PX * generator.scale) ** 2 / 1e6
    seconds = (time.perf_counter() - start) / megapixels
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads"
    return f"{seconds * 1000:,.0f} ms per megapixel of output ({machine})"


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    # Without a schema of the input: MLflow's server would truncate floats in 0..1 to zeros, and refuse base64 strings.
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    return ModelSignature(None, images, ParamSchema([ParamSpec("tile", DataType.long, AUTO_TILE)]))


def input_example(images: Mapping[str, np.ndarray], scale: int) -> np.ndarray:
    """A small input, (H, W, 3) uint8: the start of a candidate's first image; without one a color gradient."""
    height, width = EXAMPLE_PX
    for strip in images.values():
        return np.ascontiguousarray(strip[: height * scale : scale, : width * scale : scale])
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x // (width - 1), 255 * y // (height - 1), 128 + 0 * x], axis=-1).astype(np.uint8)
