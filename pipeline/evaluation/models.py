"""Resolves a model spec: a registered version, a run, a checkpoint, a weight file, or `bicubic`."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import UserError, require_package
from pipeline.imaging import DeepImage, bicubic_upscale, prepared, upscale
from pipeline.imaging.tiling import HALO_PX, Tile
from pipeline.model import RRDBNet, decode_generator, set_precision
from pipeline.model.device import emulates_bf16, require_gpu
from pipeline.model.trunk import use_kernels
from pipeline.model.weights import architecture, sizes_as_text
from pipeline.tracking.lookup import pull_generator, version_uri
from pipeline.training.model_source import GENERATOR_FILE, find_model_file, shipped_model

BICUBIC = "bicubic"
# Low-resolution pixels up to which an image is upscaled without tiles (about 2.2 GB for the paper's network), and the
# side of a tile of a larger one.
WHOLE_UP_TO_PX = 512 * 512
AUTO_TILE_PX = 256
# On a GPU a quarter of its memory decides, up to these pixels: cuDNN counts elements of a tensor in 32 bits.
GPU_UP_TO_PX = 1024 * 1024
BYTES_PER_PX = 10_000


Progress = Callable[[list[Tile]], Iterable[Tile]]


@dataclass(frozen=True, eq=False)
class Model:
    """An upscaler: a generator, or bicubic interpolation."""

    name: str
    """As the user wrote it."""
    scale: int
    generator: RRDBNet | None = None
    """None: MATLAB's bicubic."""
    info: Mapping[str, str] = field(default_factory=dict)
    """Sizes of the network, and the source of its residual scale."""
    device: str = "cpu"
    """A torch device for the generator; auto: a GPU if the computing process has one."""
    precision: str = "fp32"
    """fp32, tf32, bf16 or fp16; see `set_precision`."""
    label: str = ""
    """Name in tables and reports; empty: a short form of `name`."""
    origin: str = ""
    """What `name` was when it was opened: the version of an alias, the checkpoint of a run; empty for bicubic."""

    def upscale(self, lr: DeepImage, tile_px: int | None = None, progress: Progress = iter) -> DeepImage:
        """RGB (H, W, 3) to (H * scale, W * scale, 3) of the same dtype.

        Args:
            lr: uint8 or uint16 RGB (H, W, 3).
            tile_px: side of a tile in `lr`'s pixels; 0: no tiles; None: see `automatic_tile`.
            progress: receives the tiles; see `pipeline.imaging.upscale`.

        Raises:
            FloatingPointError: the generator's output is not finite; the message is for the user.
        """
        if self.generator is None:
            return bicubic_upscale(lr, self.scale)
        if tile_px is None:
            device = next(self._prepared.parameters()).device
            tile_px = automatic_tile(
                lr.shape[0] * lr.shape[1],
                torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
            )
        # Here and not in `open_model`: Ray's workers are other processes.
        set_precision(self.precision)
        try:
            return upscale(
                self._prepared,
                lr,
                tile_px=tile_px or None,
                dtype=self._dtype,
                require_finite=True,
                progress=progress,
            )
        except FloatingPointError:
            hint = "use --precision fp32" if self._dtype != torch.float32 else "use another model"
            raise FloatingPointError(
                f"{self.name} computes non-finite values (NaN or infinity) for it; {hint}"
            ) from None

    @property
    def _dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @cached_property
    def _prepared(self) -> nn.Module:
        """The generator on its device, in its precision."""
        assert self.generator is not None
        device = choose_device("auto") if self.device == "auto" else self.device
        network = prepared(self.generator, device, self._dtype)
        if isinstance(network, RRDBNet):
            use_kernels(network)
        return network


def automatic_tile(pixels: int, gpu_bytes: int | None = None) -> int:
    """Side of the tiles of an image of this many low-resolution pixels; 0: the whole image at once.

    `gpu_bytes`: the memory of the GPU that computes it. All of it counts, not what is free, so that an image does not
    depend on those before it.
    """
    whole, side = WHOLE_UP_TO_PX, AUTO_TILE_PX
    fitting = 0 if gpu_bytes is None else min(gpu_bytes // 4 // BYTES_PER_PX, GPU_UP_TO_PX)
    if fitting > whole:
        whole, side = fitting, math.isqrt(fitting) - 2 * HALO_PX
    return side if pixels > whole else 0


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
        source: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, a run's folder (its newest valid
            checkpoint), a .safetensors or .pth file, compact-x4 (in models/), or `bicubic`; LABEL=SOURCE sets the
            label.
        tracking_uri: the MLflow tracking server of models:/; by default the environment's.
        device: a torch device, for the generator.
        precision: fp32, tf32, bf16 or fp16.
        bicubic_scale: the scale of `bicubic`.

    Raises:
        UserError: missing, corrupt, not finite, or not a generator.
    """
    label, source = split_label(source)
    if source == BICUBIC:
        return Model(BICUBIC, bicubic_scale, label=label)
    if source.startswith("models:/"):
        origin = version_uri(source, tracking_uri)
        content = pull_generator(origin, tracking_uri).read_bytes()
    else:
        content, origin = find_model_file(source, GENERATOR_FILE, f"--model {source}")
    generator, info = decode_generator(content, source)
    return Model(source, generator.scale, generator.eval(), info, device, precision, label, origin)


def split_label(source: str) -> tuple[str, str]:
    """The two parts of LABEL=SOURCE; without a label it is empty.

    A path that exists is not split; a label may hold anything but slashes and colons.
    """
    label, _, rest = source.partition("=")
    if not rest or not label or "/" in label or ":" in label or Path(source).expanduser().exists():
        return "", source
    return label, rest


def interpolated(first: Model, second: Model, alpha: float) -> Model:
    """Network interpolation: weights (1 - alpha) * first + alpha * second (ESRGAN, sec. 3.4).

    The paper interpolates from the PSNR network (first) to the GAN network (second), with alpha = 0.8 for its figures.

    Raises:
        UserError: alpha outside 0 ... 1, `bicubic`, or networks of different sizes.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"--interpolate: ALPHA={alpha} is not between 0 and 1")
    if first.generator is None or second.generator is None:
        raise UserError("--interpolate: bicubic has no weights; give two networks")
    if architecture(first.generator) != architecture(second.generator):
        raise UserError(f"--interpolate: {first.name} and {second.name} are networks of different sizes")
    mixed, other = copy.deepcopy(first.generator), second.generator.state_dict()
    mixed.load_state_dict(
        {key: (1 - alpha) * tensor + alpha * other[key] for key, tensor in mixed.state_dict().items()}
    )
    name, origin = (
        f"{1 - alpha:.4g} * {a} + {alpha:.4g} * {b}"
        for a, b in ((first.name, second.name), (first.origin, second.origin))
    )
    return replace(first, name=name, generator=mixed, info=sizes_as_text(mixed), label="", origin=origin)


def notes(models: Sequence[Model]) -> list[str]:
    """A description of the project's own models, and warnings about how files were read and are computed."""
    # Those of Ray's workers are unknown here.
    slow = any(
        model.precision == "bf16"
        and model.device not in ("", "auto")
        and emulates_bf16(torch.device(model.device))
        for model in models
    )
    lines = [
        f"{model.name}: the file has no residual scale; {model.info['residual_scale']} is assumed"
        for model in models
        if model.info.get("residual_scale_source") == "default"
    ]
    lines += [f"{model.name}: {model.info['description']}" for model in models if shipped_model(model.name)]
    if slow:
        lines.append("--precision bf16: this device emulates bfloat16 (slow); use fp32")
    return lines


def choose_device(name: str, workers: int = 0) -> str:
    """`auto` is CUDA if torch has a device, else the CPU.

    With Ray workers, `auto` and `cuda` are returned unchanged, because this process may lack a GPU; `map_on_ray`
    compares them with the cluster's GPUs.

    Raises:
        UserError: an unusable device, or one that Ray has to choose; or Ray is not installed.
    """
    if workers:
        require_package("ray", f"--workers {workers}", "use --workers 0")
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: with --workers Ray assigns the GPUs; use auto, cpu or cuda")
        return name
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        require_gpu(f"--device {name}", "use --device cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return name
