"""Configuration of the generator's and the discriminator's sizes."""

from typing import Literal

from pydantic import Field

from pipeline.section import Section


class ModelConfig(Section):
    """RRDBNet's sizes (ESRGAN, sec. 3.1) and the choice of discriminator."""

    num_block: int = Field(23, ge=1, le=64, description="RRDB blocks in the generator's trunk.")
    num_feat: int = Field(64, ge=4, le=512, description="Feature channels of the trunk.")
    num_grow_ch: int = Field(32, ge=2, le=256, description="Channels that each dense convolution adds.")
    residual_scale: float = Field(
        0.2, gt=0, le=1, description="Factor on every residual, in the dense block and in the RRDB."
    )
    discriminator: Literal["vgg", "unet"] = Field(
        "vgg", description="vgg: ESRGAN's VGG-style classifier; unet: U-Net with spectral norm."
    )
    discriminator_num_feat: int = Field(
        64, ge=4, le=512, description="Feature channels of the discriminator's first layer."
    )
