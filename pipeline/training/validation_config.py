"""Configuration of the validation within a run."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from pipeline.metrics.names import FIDELITY, MetricName
from pipeline.section import Section

HELD_OUT = "held_out"
"""The data set's held-out images, among the names of `validation.sets`."""


def _folders(value: object) -> object:
    keys = set(value) if isinstance(value, Mapping) else None
    if not isinstance(value, str | SetFolders) and keys != {"hr", "lr"}:
        raise ValueError(f"{value!r}: give a folder, or {{hr: DIR, lr: DIR}}")
    return value


def _set_name(name: str) -> str:
    if name == HELD_OUT:
        raise ValueError(f"{name} is the name of the data set's held-out images; choose another name")
    return name


class SetFolders(Section):
    """A set with its HR and LR images in two folders."""

    hr: str = Field(description="HR images.")
    lr: str = Field(description="LR images of the same names.")


class ValidationConfig(Section):
    """What is measured, and on which images."""

    metrics: tuple[MetricName, ...] = Field(
        FIDELITY,
        min_length=1,
        description="Metrics of every validation: PSNR and SSIM on luma or RGB; lpips (AlexNet), dists (VGG16) and "
        "feature_distance (EfficientNet-Lite0, of the extra `features`), for which smaller is better; lr_psnr and "
        "color_drift (mean difference of colors, in 8-bit levels) of the downscaled SR image and the LR image.",
    )
    weights_folder: str | None = Field(
        None,
        description="Folder with torchvision's alexnet-owt-7be5be79.pth (for lpips) and vgg16-397923af.pth (for "
        "dists). Default: torch hub's cache.",
    )
    sets: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$"), AfterValidator(_set_name)],
        Annotated[str | SetFolders, BeforeValidator(_folders)],
    ] = Field(
        {},
        description="Further sets of images by name: `{Set5: DIR, Set14: {hr: DIR, lr: DIR}}`; folders or s3:// "
        "prefixes in the layouts of evaluate's --hr and --lr. Their metrics are called Set14/psnr_y.",
    )
    select_on: str | None = Field(
        None,
        description="Set whose metrics choose the best checkpoints: held_out or one of validation.sets. Default: "
        "held_out, if the data set has held-out images, else the first of validation.sets.",
    )

    @field_validator("select_on")
    @classmethod
    def _known_set(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = [HELD_OUT, *info.data.get("sets", ())]
        if name not in (None, *known):
            raise ValueError(f"{name} is not one of {', '.join(known)}")
        return name
