"""A generator's entry in OpenModelDB, the community's list of upscaling models (https://openmodeldb.info)."""

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.model import RRDBNet
from pipeline.tracking.lookup import RegisteredCard

TO_FILL_IN = ("author", "license", "tags", "urls")
"""What the model card does not hold: the author's name there, an SPDX license, tags, and where the file is."""
_PLATFORMS = {".safetensors": "pytorch", ".pth": "pytorch", ".onnx": "onnx"}
# Sections of the card that describe the weights and not this project's files.
_SECTIONS = ("License", "Limits")


def openmodeldb_entry(generator: RRDBNet, file: Path, card: RegisteredCard) -> dict[str, Any]:
    """The entry as JSON values, by OpenModelDB's schema (its repository, src/lib/schema.ts).

    The name of `file`, the exported generator, becomes the model's name; `card` is that of the registered generator.
    """
    content = file.read_bytes()
    images = re.match(r"(\d+) image", str(card.origin.get("data", "")))
    training = {
        "trainingIterations": card.origin.get("step"),
        "trainingBatchSize": card.config.get("batch_size"),
        "trainingHRSize": card.config.get("crop_px"),
        "dataset": card.origin.get("data"),
        "datasetSize": int(images[1]) if images else None,
    }
    return {
        "name": file.stem,
        "author": [],
        "license": None,
        "tags": [],
        "description": _description(card.text),
        "date": datetime.now(UTC).date().isoformat(),
        "architecture": "esrgan",
        "size": [f"{generator.num_feat}nf", f"{generator.num_block}nb"],
        "scale": generator.scale,
        "inputChannels": 3,
        "outputChannels": 3,
        "resources": [
            {
                "platform": _PLATFORMS[file.suffix],
                "type": file.suffix.removeprefix("."),
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "urls": [],
            }
        ],
        **{name: value for name, value in training.items() if value},
        "images": [],
    }


def _description(card: str) -> str:
    """The card without its title, and without the sections that only concern this project."""
    head, *sections = card.split("\n## ")
    kept = [f"## {section.strip()}" for section in sections if section.split("\n")[0].strip() in _SECTIONS]
    return "\n\n".join([head.partition("\n")[2].strip(), *kept])
