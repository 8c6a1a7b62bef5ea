"""The files of a logged model: what MLflow needs to serve the generator, and a card for people."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image

from pipeline.errors import without_secrets
from pipeline.model import RRDBNet, load_generator
from pipeline.model.export import export_onnx

SERVING_CODE = Path(__file__).with_name("serving_model.py")
WEIGHTS = "generator.safetensors"
EXAMPLE_PX = (24, 32)  # less than a validation picture shows
LICENCE_CHARACTERS = 1500
PICTURES_SHOW = "From left to right: input, bicubic, the result of each stage, original."
NO_LICENCE = (
    "Not stated. Whether weights may be passed on depends on the photographs that they were trained on."
)


@dataclass(frozen=True)
class ModelCard:
    """What a registered generator says about where it comes from."""

    config_text: str
    """The whole configuration, as YAML."""
    data_sha256: str
    """Digest of the data set's manifest."""
    data: str = ""
    """The images that the manifest lists, in a few words."""
    licence: str = NO_LICENCE
    """Licence of the photographs, and so of the weights."""
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name to (H, W, 3) uint8 picture, shown in the card."""
    example: np.ndarray | None = None
    """A small low-resolution photograph, (H, W, 3) uint8, that becomes the input example."""


def write_model(
    folder: Path,
    generator_path: Path,
    card: ModelCard,
    text: str,
    facts: Mapping[str, object],
    identity: Model,
) -> None:
    """Writes a pyfunc model "from code": no pickle, any image size, and nothing of this project needed to load it.

    Args:
        folder: a folder to be made.
        generator_path: the generator's .safetensors file.
        card: where the generator comes from.
        text: the card, in Markdown.
        facts: small values for MLflow's metadata.
        identity: MLflow's ids of the logged model.
    """
    generator, _ = load_generator(generator_path)
    with tempfile.TemporaryDirectory(prefix="esrgan-model-") as name:
        place = Path(name)
        (place / "architecture.json").write_text(json.dumps(sizes(generator), indent=2) + "\n")
        (place / WEIGHTS).write_bytes(Path(generator_path).read_bytes())
        export_onnx(generator, place / "generator.onnx")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(SERVING_CODE),
            artifacts={
                "architecture": str(place / "architecture.json"),
                "weights": str(place / WEIGHTS),
                "onnx": str(place / "generator.onnx"),
            },
            signature=_signature(),
            input_example=_example(card)[None],
            model_config={"device": "auto"},
            pip_requirements=[
                f"{name}=={metadata.version(name).split('+')[0]}" for name in ("torch", "numpy")
            ],
            metadata=dict(facts),
            mlflow_model=identity,
        )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(without_secrets(card.config_text), encoding="utf-8")
    for index, picture in enumerate(card.pictures.values()):
        Image.fromarray(picture).save(folder / _picture_file(index))


def card_text(
    name: str,
    card: ModelCard,
    metrics: Mapping[str, float],
    facts: Mapping[str, object],
    *,
    shows_pictures: bool = True,
) -> str:
    """The model card, in Markdown; without `shows_pictures` it only says which files they are."""
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    origin = "\n".join(f"- {key}: `{value}`" for key, value in facts.items())
    files = {title: _picture_file(index) for index, title in enumerate(card.pictures)}
    shown = [
        f"**{title}**\n\n![{title}]({file})" if shows_pictures else f"- {title}: `{file}`"
        for title, file in files.items()
    ]
    where = (
        PICTURES_SHOW if shows_pictures else f"{PICTURES_SHOW} They lie among the logged model's artifacts."
    )
    pictures = "\n\n".join(["\n\n## Pictures", where, ("\n\n" if shows_pictures else "\n").join(shown)])
    return f"""# {name}

ESRGAN generator (RRDBNet) for single-image super-resolution: uint8 RGB in, uint8 RGB out.

| metric | value |
|---|---|
{rows}

Measured on held-out photographs of the training data set below.

## Use
```python
model = mlflow.pyfunc.load_model("models:/{name}@champion")
high = model.predict(low)                        # uint8 (N, H, W, 3), any H and W
high = model.predict(low, params={{"tile": 256}})  # large images, bounded memory
```
Needs torch, or onnxruntime alone: `artifacts/generator.onnx` has the same interface.

## Origin
{origin}
- the whole configuration: `config.yaml`

## Licence
{card.licence}

## Limits
It invents plausible detail. Do not read text, faces or measurements out of its results.{pictures if files else ""}
"""


def example_from(strip: np.ndarray, scale: int) -> np.ndarray:
    """The input example in a validation picture, which begins with the input, each pixel `scale` times as large."""
    height, width = EXAMPLE_PX
    return np.ascontiguousarray(strip[: height * scale : scale, : width * scale : scale])


def licence_note(licences: Mapping[str, str | None]) -> str:
    """The card's note on licences.

    Args:
        licences: set of photographs (`train`, `held_out`) to the text that came with them, as a data set's manifest
            has it.
    """
    texts: dict[str, list[str]] = {}
    for name, text in licences.items():
        if text and text.strip():
            texts.setdefault(text.strip(), []).append(name)
    if not texts:
        return NO_LICENCE
    notes = []
    for text, names in texts.items():
        shown = text if len(text) <= LICENCE_CHARACTERS else text[:LICENCE_CHARACTERS] + " ..."
        quoted = "\n".join(f"    {line}" for line in shown.splitlines())
        notes.append(f"Photographs ({', '.join(names)}):\n\n{quoted}")
    return "Whether weights may be passed on depends on the photographs.\n\n" + "\n\n".join(notes)


def sizes(generator: RRDBNet) -> dict[str, object]:
    """RRDBNet's arguments, as architecture.json has them."""
    return {
        "network": "RRDBNet",
        "num_feat": generator.num_feat,
        "num_block": generator.num_block,
        "num_grow_ch": generator.num_grow_ch,
        "residual_scale": generator.residual_scale,
        "scale": generator.scale,
    }


def _signature() -> ModelSignature:
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    return ModelSignature(images, images, ParamSchema([ParamSpec("tile", DataType.long, 0)]))


def _example(card: ModelCard) -> np.ndarray:
    """A small low-resolution image: the card's, cut to a handy size, or a ramp of colours."""
    height, width = EXAMPLE_PX
    if card.example is not None:
        return np.ascontiguousarray(card.example[:height, :width])
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x // (width - 1), 255 * y // (height - 1), 128 + 0 * x], axis=-1).astype(np.uint8)


def _picture_file(index: int) -> str:
    return f"picture-{index}.png"
