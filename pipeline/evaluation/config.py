"""Configuration of the commands evaluate, upscale and export; each field is a flag."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.evaluation.crops import Box
from pipeline.metrics.names import MetricName
from pipeline.section import Section

MODEL_HELP = (
    "models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint's or a run's folder, a weight file (.safetensors, "
    ".pth, .pt, .ckpt), compact-x4 (in models/), or bicubic; LABEL=M sets the name in tables and reports."
)
# Entries of `json_schema_extra` are arguments of argparse.
_TWO_AND_ALPHA: dict[str, Any] = {"nargs": 3, "metavar": ("A", "B", "ALPHA")}


def _boxes(value: object) -> object:
    """NAME:X,Y,W,H for each crop. Raises ValueError."""
    if not isinstance(value, list | tuple):
        return value
    boxes = {}
    for text in value:
        name, _, numbers = str(text).rpartition(":")
        try:
            x, y, width, height = (int(number) for number in numbers.split(","))
        except ValueError:
            name = ""
        if not name or min(x, y) < 0 or min(width, height) < 4:
            raise ValueError(f"{text}: write NAME:X,Y,W,H, such as baby.png:120,80,128,128")
        boxes[name] = Box(x, y, width, height)
    return boxes


Model = Annotated[str, Field(description=MODEL_HELP, json_schema_extra={"aliases": ["-n"], "metavar": "M"})]
TilePx = Annotated[
    int | None,
    Field(
        ge=0,
        description="Tile side in low-resolution pixels; smaller tiles need less memory; 0: no tiles (default: 256 for "
        "images of more than 512 x 512; on a GPU with more than 10 GB, larger tiles for larger images).",
        json_schema_extra={"aliases": ["-t"], "metavar": "PX"},
    ),
]
Device = Annotated[str, Field(description="auto, cpu or cuda.")]
Precision = Annotated[
    Literal["fp32", "tf32", "bf16", "fp16"],
    Field(
        description="fp32: IEEE float32. tf32 and fp16 (GPUs) and bf16 (GPUs, and CPUs that support it) are faster; "
        "some pixels differ by a gray level."
    ),
]
Workers = Annotated[
    int,
    Field(
        ge=0,
        description="Ray workers that share the images; 0: this process.",
        json_schema_extra={"metavar": "N"},
    ),
]
TrackingUri = Annotated[
    str | None,
    Field(
        repr=False,
        description="MLflow tracking server of models:/ (default: ESRGAN_TRACKING__URI, then "
        "MLFLOW_TRACKING_URI, then the last training run's).",
        json_schema_extra={"flag": "--tracking.uri", "metavar": "URI"},
    ),
]


def _json_field(result: str) -> Any:
    return Field(
        None,
        description=f"Also write {result} to this file.",
        json_schema_extra={"flag": "--json", "metavar": "FILE"},
    )


class EvaluateConfig(Section):
    """One evaluation: models, images, output."""

    model: tuple[str, ...] = Field(
        (), description=MODEL_HELP, json_schema_extra={"nargs": "+", "action": "extend", "metavar": "M"}
    )
    hr: str = Field(
        description="HR images: a folder, a file or an s3:// prefix; HR and LR folders in it (HR/ LR/, GT/ LQ/, *_HR/ "
        "*_LR_*/X4/), or name_HR.png next to name_LR.png, are recognized.",
        json_schema_extra={"metavar": "DIR"},
    )
    out: str = Field(
        description="Output folder for metrics.json, report.html and comparison.png.",
        json_schema_extra={"metavar": "DIR"},
    )
    lr: str | None = Field(
        None,
        description="LR images of the same names (a suffix such as x4 or _LR is ignored); without them, the HR images "
        "are downscaled by MATLAB's bicubic.",
        json_schema_extra={"metavar": "DIR"},
    )
    tracking_uri: TrackingUri = None
    metrics: tuple[MetricName, ...] | None = Field(
        None,
        description="Metrics in addition to PSNR, SSIM, LR-PSNR and detail ratio: lpips (AlexNet), dists (VGG16), "
        "feature_distance (EfficientNet-Lite0), color_drift (of the downscaled SR image from the LR image, in 8-bit "
        "levels). Default: the perceptual ones whose weights are found; without names: also color_drift.",
        json_schema_extra={"nargs": "*", "metavar": "NAME"},
    )
    weights_folder: str | None = Field(
        None,
        description="Folder with alexnet-owt-7be5be79.pth (for lpips) and vgg16-397923af.pth (for dists); default: "
        "torch hub's cache.",
        json_schema_extra={"metavar": "DIR"},
    )
    interpolate: tuple[tuple[str, str, float], ...] = Field(
        (),
        description="Also the network (1 - ALPHA) * A + ALPHA * B, such as PSNR GAN 0.8 (ESRGAN, sec. 3.4).",
        json_schema_extra={**_TWO_AND_ALPHA, "action": "append"},
    )
    limit: int | None = Field(
        None, ge=1, description="Only the first N images.", json_schema_extra={"metavar": "N"}
    )
    crop: Annotated[dict[str, Box], BeforeValidator(_boxes)] = Field(
        {},
        description="The part of an image that the report shows, in HR pixels (default: where the models differ most).",
        json_schema_extra={"action": "append", "metavar": "NAME:X,Y,W,H"},
    )
    scale: int | None = Field(None, ge=2, le=4, description="Scale of bicubic (default: the models', or 4).")
    border: int | None = Field(
        None,
        ge=0,
        description="Pixels excluded at each edge (default: the scale).",
        json_schema_extra={"metavar": "PX"},
    )
    tile: TilePx = None
    device: Device = "auto"
    precision: Precision = "fp32"
    workers: Workers = 0
    json_file: str | None = _json_field("the means")

    @model_validator(mode="after")
    def _has_a_model(self) -> "EvaluateConfig":
        if not self.model and not self.interpolate:
            raise ValueError("--model: name at least one model, or bicubic")
        return self


class UpscaleConfig(Section):
    """One upscaling of an image, a folder or a prefix."""

    model: Model
    input: str = Field(
        description="An image, a folder (with all its subfolders) or an s3:// prefix.",
        json_schema_extra={"aliases": ["-i"], "metavar": "PATH"},
    )
    output: str = Field(
        description="Output folder. Relative paths are kept; existing outputs of the same model and settings are "
        "skipped. For a single image also a file: a name that ends in .png, .jpg or .webp.",
        json_schema_extra={"aliases": ["-o"], "metavar": "PATH"},
    )
    tracking_uri: TrackingUri = None
    outscale: float | None = Field(
        None,
        gt=0,
        le=16,
        description="Scale of the outputs (default: the model's): the model's result is resized by Lanczos.",
        json_schema_extra={"aliases": ["-s"], "metavar": "SCALE"},
    )
    format: Literal["png", "jpg", "webp", "auto"] = Field(
        "png", description="Format of the outputs; auto: each input's, or png."
    )
    overwrite: bool = Field(
        False,
        description="Overwrite existing outputs, also those of another model or other settings.",
        json_schema_extra={"action": "store_true"},
    )
    tile: TilePx = None
    max_megapixels: float = Field(
        200.0, gt=0, description="Larger images are rejected.", json_schema_extra={"metavar": "N"}
    )
    device: Device = "auto"
    precision: Precision = "fp32"
    workers: Workers = 0
    json_file: str | None = _json_field("{written, skipped, failed}")


class ExportConfig(Section):
    """One export of a generator."""

    model: str | None = Field(None, description=MODEL_HELP, json_schema_extra={"metavar": "M"})
    interpolate: tuple[str, str, float] | None = Field(
        None,
        description="Instead of --model: the network (1 - ALPHA) * A + ALPHA * B, such as PSNR GAN 0.8 (ESRGAN, "
        "sec. 3.4).",
        json_schema_extra=_TWO_AND_ALPHA,
    )
    output: str = Field(
        description="Output file: .safetensors, .pth or .onnx.", json_schema_extra={"metavar": "FILE"}
    )
    onnx: Literal["uint8", "fp32", "fp16"] = Field(
        "uint8",
        description="Images of an .onnx file. uint8: (N, H, W, 3). fp32, fp16: (N, 3, H, W) in [0, 1], as other "
        "programs expect; fp16 also halves the file.",
    )
    openmodeldb: str | None = Field(
        None,
        description="Also write OpenModelDB's entry (JSON) of the output to this file, from the model card of a "
        "registered model (models:/).",
        json_schema_extra={"metavar": "FILE"},
    )
    tracking_uri: TrackingUri = None

    @field_validator("output")
    @classmethod
    def _known_suffix(cls, output: str) -> str:
        if not output.endswith((".safetensors", ".pth", ".onnx")):
            raise ValueError(f"{output} must end in .safetensors, .pth or .onnx")
        return output

    @model_validator(mode="after")
    def _one_source(self) -> "ExportConfig":
        if (self.model is None) == (self.interpolate is None):
            raise ValueError("give either --model M or --interpolate A B ALPHA")
        if "onnx" in self.model_fields_set and not self.output.endswith(".onnx"):
            raise ValueError(f"--onnx {self.onnx}: --output {self.output} is not an .onnx file")
        if self.openmodeldb is not None and "models:/" not in (self.model or ""):
            raise ValueError(
                "--openmodeldb: only registered models have a model card; use --model models:/NAME@ALIAS"
            )
        return self
