"""Configuration of the validation within a run."""

from pydantic import Field

from pipeline.metrics.names import FIDELITY, MetricName
from pipeline.section import Section


class ValidationConfig(Section):
    """What is measured on the held-out images."""

    metrics: tuple[MetricName, ...] = Field(
        FIDELITY,
        min_length=1,
        description="Metrics of every validation: PSNR and SSIM on luma or RGB; lpips (AlexNet), dists (VGG16) and "
        "feature_distance (EfficientNet-Lite0, of the extra `features`), for which smaller is better; color_drift, the "
        "mean difference in 8-bit levels between the colors of the downscaled SR image and the LR image.",
    )
    weights_folder: str | None = Field(
        None,
        description="Folder with torchvision's alexnet-owt-7be5be79.pth (for lpips) and vgg16-397923af.pth (for "
        "dists). Default: torch hub's cache.",
    )
