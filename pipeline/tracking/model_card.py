"""The model card: a registered generator's origin, metrics, use, license and limits, in Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.metrics import METRICS, metric_of
from pipeline.model import RRDBNet
from pipeline.run_folder import TrainedGenerator
from pipeline.tracking.candidate import Candidate

LICENSE_CHARACTERS = 1500
NO_LICENSE = "Not stated. Whether weights may be redistributed depends on the training images."
IMAGE_CAPTION = "From left to right: input, bicubic, the result of each stage, original."
INITIAL_LICENSE = "\n\nTraining started from other weights (see Origin); their license applies as well."


@dataclass(frozen=True)
class Usage:
    """What the card's example needs."""

    uri: str
    """Tracking URI, without a password."""
    model_id: str
    speed: str
    """For a megapixel, with the machine."""


def card_text(
    candidate: Candidate,
    trained: TrainedGenerator,
    origin: Mapping[str, object],
    generator: RRDBNet,
    usage: Usage,
    *,
    embed_images: bool = True,
) -> str:
    """The model card of the candidate's generator, or of one of an earlier stage, in Markdown.

    Without `embed_images` it only lists the images' files.
    """
    card = candidate.description
    facts = "\n".join(f"- {key}: `{value}`" for key, value in origin.items())
    images = ""
    if candidate.images:
        files = {title: image_file(index) for index, title in enumerate(candidate.images)}
        if embed_images:
            shown = "\n\n".join(f"**{title}**\n\n![{title}]({file})" for title, file in files.items())
        else:
            shown = "Files among the logged model's artifacts:\n\n"
            shown += "\n".join(f"- {title}: `{file}`" for title, file in files.items())
        images = f"\n\n## Images\n\n{IMAGE_CAPTION}\n\n{shown}"
    count = sum(parameter.numel() for parameter in generator.parameters())
    return f"""# {card.model_name}

ESRGAN generator (RRDBNet) for x{generator.scale} super-resolution: uint8 RGB in, uint8 RGB out.
Trained on {card.data or "images whose digest is below"}; weights of step {origin["step"]}.

{measured(trained.metrics, card.bicubic, card.metric if trained == card.generator else None)}

| | |
|---|---|
| network | {generator.num_block} blocks, {generator.num_feat} features, {generator.num_grow_ch} growth channels |
| parameters | {count:,} ({count * 4 / 1e6:.1f} MB) |
| speed | {usage.speed} |
| expected input | photos like the training images, reduced by bicubic; noise and JPEG artifacts are enlarged |

## Use
```python
import mlflow
import numpy as np
from PIL import Image

mlflow.set_tracking_uri("{usage.uri}")
model = mlflow.pyfunc.load_model("models:/{usage.model_id}")
lr = np.asarray(Image.open("small.png").convert("RGB"))[None]  # uint8 (N, H, W, 3), any H and W
sr = model.predict(lr)                                         # uint8 (N, {generator.scale}H, {generator.scale}W, 3)
Image.fromarray(sr[0]).save("large.png")
```
`models:/{usage.model_id}` is exactly this model. Requires onnxruntime, or torch:
`artifacts/generator.onnx` has the same interface.

## Origin
{facts}
- the whole configuration: `config.yaml`

## License
{card.license or NO_LICENSE}{INITIAL_LICENSE if card.initial else ""}

## Limits
It invents plausible detail. Do not read text, faces or measurements from its results.{images}
"""


def image_file(index: int) -> str:
    """Name of an image of the card, next to it."""
    return f"image-{index}.png"


def set_of(key: str) -> str:
    """The set in a metric's name: `Set14` of `Set14/lpips`; empty for the held-out images."""
    return key.rpartition("/")[0]


def measured(metrics: Mapping[str, float], bicubic: Mapping[str, float], selected_by: str | None) -> str:
    """The card's table of metrics, and what chose the checkpoint.

    Args:
        metrics: the generator's validation metrics, such as psnr_y and Set14/lpips; may be empty.
        bicubic: those of bicubic upscaling; may be empty.
        selected_by: the metric that chose the generator among the checkpoints of its stage; None: not stated.
    """
    if not metrics:
        return "It was not validated: there were no images for that."
    text = (
        f"{_table(metrics, bicubic)}\n\n"
        "Measured on images that were not used in training (`held out`: of the training data set below)."
    )
    if selected_by is None:
        return text
    name, metric = set_of(selected_by), METRICS.get(metric_of(selected_by))
    return (
        f"{text} Among the checkpoints of its stage this one was chosen by {metric.label if metric else selected_by} "
        f"on {name or 'the held-out images'}."
    )


def _table(metrics: Mapping[str, float], bicubic: Mapping[str, float]) -> str:
    """A row for this generator and one for bicubic on each set, a column for each metric."""
    names = [name for name in METRICS if name in {metric_of(key) for key in metrics}]
    header = ["images", "upscaled by", *(METRICS[name].title for name in names)]
    rows = []
    for each in dict.fromkeys(map(set_of, metrics)):
        for label, values in (("bicubic", bicubic), ("**this model**", metrics)):
            found = [values.get(f"{each}/{name}" if each else name) for name in names]
            if any(value is not None for value in found):
                pairs = zip(names, found, strict=True)
                cells = ["" if value is None else METRICS[name].shown(value) for name, value in pairs]
                rows.append([each or "held out", label, *cells])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def license_note(licenses: Mapping[str, str | None]) -> str:
    """The card's note on licenses; `licenses` maps `train` and `held_out` to the text in the manifest."""
    subsets: dict[str, list[str]] = {}
    for name, text in licenses.items():
        if text and text.strip():
            subsets.setdefault(text.strip(), []).append(name)
    if not subsets:
        return NO_LICENSE
    notes = []
    for text, names in subsets.items():
        shown = text if len(text) <= LICENSE_CHARACTERS else text[:LICENSE_CHARACTERS] + " ..."
        quoted = "\n".join(f"    {line}" for line in shown.splitlines())
        notes.append(f"Images ({', '.join(names)}):\n\n{quoted}")
    return "Whether weights may be redistributed depends on the training images.\n\n" + "\n\n".join(notes)
