"""Configuration of the initial weights."""

from pydantic import Field

from pipeline.section import Section

NETWORKS = ("generator", "discriminator")


class InitConfig(Section):
    """Initial weights from files or the registry; read once, before training starts."""

    generator: str | None = Field(
        None,
        min_length=1,
        description="Initial weights of the generator: models:/NAME@ALIAS, models:/NAME/VERSION, a run's or "
        "checkpoint's folder, a .safetensors, .pth, .pt or .ckpt file, also in an object store, or compact-x4 (in "
        "models/). Default: random.",
    )
    discriminator: str | None = Field(
        None,
        min_length=1,
        description="Initial weights of the discriminator: a run's or checkpoint's folder (stage 2), a .safetensors or "
        ".pth file with BasicSR's names. Default: random.",
    )
    partial: bool = Field(
        False,
        description="Take only the layers that fit by name and shape (another scale, more or fewer blocks).",
    )
    adopt_sizes: bool = Field(False, description="Take the network sizes in `model` from the files.")
