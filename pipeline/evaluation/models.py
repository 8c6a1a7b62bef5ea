"""Opens whatever a user may mean by a model: a registered version, a run, a checkpoint, a file, or `bicubic`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.imaging import bicubic_upscale, upscale
from pipeline.model import RRDBNet, decode_generator, set_precision
from pipeline.storage import Storage, is_remote
from pipeline.tracking.lookup import pull_generator
from pipeline.training import checkpoint

BICUBIC = "bicubic"
MODEL_HELP = (
    "models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint's or a run's folder, a .safetensors or .pth file, "
    "or bicubic; LABEL=M gives it a name of your own."
)
WEIGHTS = "generator.safetensors"
SUFFIXES = (".safetensors", ".pth")
# Low-resolution pixels up to which an image goes through in one piece (about 2.2 GB for the paper's network).
WHOLE_UP_TO_PX = 512 * 512
AUTO_TILE_PX = 256

Image = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Model:
    """Something that makes a picture larger."""

    name: str
    """As the user wrote it."""
    scale: int
    generator: RRDBNet | None = None
    """None: MATLAB's bicubic."""
    info: Mapping[str, str] = field(default_factory=dict)
    """What the file says about the network, and where its residual scale comes from."""
    device: str = "cpu"
    """Where the generator computes; auto: on a GPU where the process that does it has one."""
    precision: str = "fp32"
    """fp32, tf32 or bf16; see `set_precision`."""
    label: str = ""
    """What tables and reports call it; empty: something short from the name."""

    def upscale(self, lr: Image, tile_px: int | None = None) -> Image:
        """uint8 RGB (H, W, 3) to (H * scale, W * scale, 3).

        Args:
            lr: the picture.
            tile_px: side of a tile in `lr`'s pixels; 0: never tiles; none: 256 from 512 x 512 pixels on.

        Raises:
            FloatingPointError: the generator's output is not finite; the message is for the user.
        """
        if self.generator is None:
            return bicubic_upscale(lr, self.scale)
        if tile_px is None:
            tile_px = AUTO_TILE_PX if lr.shape[0] * lr.shape[1] > WHOLE_UP_TO_PX else 0
        # Here and not where the model is opened: Ray's workers are other processes.
        set_precision(self.precision)
        device = choose_device("auto") if self.device == "auto" else self.device
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        try:
            return upscale(
                self.generator, lr, tile_px=tile_px or None, device=device, dtype=dtype, require_finite=True
            )
        except FloatingPointError:
            hint = "use --precision fp32" if self.precision == "bf16" else "use another model"
            raise FloatingPointError(
                f"{self.name} computes non-finite values (NaN or infinity) for it; {hint}"
            ) from None


def open_model(
    source: str,
    tracking_uri: str | None = None,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    bicubic_scale: int = 4,
) -> Model:
    """Opens a model.

    Args:
        source: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, a run's folder (its newest sound
            checkpoint), a .safetensors or .pth file, or `bicubic`; LABEL=SOURCE gives it a name of your own.
        tracking_uri: the store behind models:/; by default the environment's.
        device: where the generator computes.
        precision: fp32, tf32 or bf16.
        bicubic_scale: the factor of `bicubic`.

    Raises:
        UserError: not there, corrupt, not finite, or not a generator.
    """
    label, source = split_label(source)
    if source == BICUBIC:
        return Model(BICUBIC, bicubic_scale, label=label)
    if source.startswith("models:/"):
        path = pull_generator(source, tracking_uri)
        content = path.read_bytes()
    else:
        content = _weights(source)
    generator, info = decode_generator(content, source)
    return Model(source, generator.scale, generator.eval(), info, device, precision, label)


def split_label(source: str) -> tuple[str, str]:
    """The two parts of LABEL=SOURCE; the label is empty where there is none. Paths may hold equals signs."""
    label, equals, rest = source.partition("=")
    if equals and label and rest and not any(sign in label for sign in "/:."):
        return label, rest
    return "", source


def interpolated(first: Model, second: Model, alpha: float) -> Model:
    """Network interpolation: weights (1 - alpha) * first + alpha * second (ESRGAN, sec. 3.4).

    The paper interpolates from the PSNR network (first) to the GAN network (second), with alpha = 0.8 for its figures.

    Raises:
        UserError: alpha outside 0 ... 1, `bicubic`, or networks of different sizes.
    """
    name = f"{1 - alpha:.4g} * {first.name} + {alpha:.4g} * {second.name}"
    if not 0 <= alpha <= 1:
        raise UserError(f"--interpolate: ALPHA={alpha} is not between 0 and 1")
    if first.generator is None or second.generator is None:
        raise UserError("--interpolate: bicubic has no weights; give two networks")
    a, b = first.generator.state_dict(), second.generator.state_dict()
    sizes = [(model.scale, float(model.info["residual_scale"])) for model in (first, second)]
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (a, b)]
    if sizes[0] != sizes[1] or shapes[0] != shapes[1]:
        raise UserError(f"--interpolate: {first.name} and {second.name} are networks of different sizes")
    mixed = {key: (1 - alpha) * a[key] + alpha * b[key] for key in a}
    info = {
        key: first.info[key] for key in ("num_feat", "num_block", "num_grow_ch", "residual_scale", "scale")
    }
    with torch.device("meta"):
        generator = RRDBNet(
            int(info["num_feat"]), int(info["num_block"]), int(info["num_grow_ch"]),
            float(info["residual_scale"]), first.scale,
        )  # fmt: skip
    generator.load_state_dict(mixed, assign=True)
    return replace(first, name=name, generator=generator.eval(), info=info, label="")


def notes(models: Sequence[Model]) -> list[str]:
    """What a user should know about how the files were read and how they compute, one line each."""
    slow = (
        any(model.precision == "bf16" and model.device == "cpu" for model in models) and not _cpu_has_bf16()
    )
    lines = [
        f"{model.name}: the file does not say its residual scale; {model.info['residual_scale']} is taken"
        for model in models
        if model.info.get("residual_scale_source") == "default"
    ]
    if slow:
        lines.append(
            "--precision bf16: this CPU only imitates bfloat16, many times slower; fp32 is faster here"
        )
    return lines


def _cpu_has_bf16() -> bool:
    """Whether the CPU computes convolutions in bfloat16 (x86: AVX-512 or newer)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True  # not known: nothing to say


def choose_device(name: str, workers: int = 0) -> str:
    """`auto` is a CUDA device where torch sees one, else the CPU.

    With Ray workers the device is theirs, and this process may lack it: `auto` and `cuda` are then kept, and `spread`
    compares them with the cluster's GPUs.

    Raises:
        UserError: a device that is not there, or one that Ray is to choose.
    """
    if workers:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: with --workers Ray assigns the GPUs; use auto, cpu or cuda")
        return name
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return name


def _weights(source: str) -> bytes:
    """The content of the generator's file that `source` names."""
    if source.lower().endswith(SUFFIXES):
        folder, _, name = source.rpartition("/")
        storage = Storage(folder or ("/" if source.startswith("/") else "."))
        try:
            return storage.read_bytes(name)
        except (OSError, pyarrow.ArrowException):
            raise UserError(f"--model {source}: there is no such file, or it cannot be read") from None
    if not is_remote(source) and "://" not in source and Path(source).expanduser().is_file():
        raise UserError(f"--model {source}: weights are .safetensors or .pth files")
    storage = Storage(source)
    if storage.exists(WEIGHTS):
        return _from_checkpoint(storage)
    damaged = ""
    for found in reversed(checkpoint.listed(storage)):
        try:
            return _from_checkpoint(storage / found.folder)
        except UserError as error:
            damaged = damaged or f"; {error}"
    if storage.exists():
        raise UserError(
            f"--model {source}: neither a checkpoint ({WEIGHTS}) nor a run with one (checkpoints/){damaged}"
        )
    raise UserError(
        f"--model {source}: there is no such file or folder; give models:/NAME@ALIAS, a checkpoint's or run's folder, "
        "a .safetensors or .pth file, or bicubic"
    )


def _from_checkpoint(folder: Storage) -> bytes:
    """The generator's file in a checkpoint, checked against the manifest."""
    try:
        content = folder.read_bytes(WEIGHTS)
        expected = json.loads(folder.read_bytes("manifest.json"))["files"][WEIGHTS]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        raise UserError(
            f"{folder.uri}: not a finished checkpoint (its manifest.json is missing or damaged); "
            f"name the file {WEIGHTS} to use it all the same"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(
            f"{folder.path(WEIGHTS)}: differs from its checksum in manifest.json; use another checkpoint"
        )
    return content
