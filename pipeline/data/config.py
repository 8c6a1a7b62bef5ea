"""Where photographs come from, how they become patches, and how patches reach training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.section import Section


def _number(value: Any) -> Any:
    """Flags and the environment give text, which a choice of numbers does not take."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class DataConfig(Section):
    """The data set: its source, its geometry on disk, and the feed."""

    source: str | None = Field(
        None,
        description="Photographs to train on: a folder, a glob, a .zip, an s3:// prefix, `sample` (photographs that "
        "come with installed packages) or `div2k` (downloads the official archives, 4 GB).",
    )
    held_out: str | None = Field(
        None,
        description="Photographs for validation that training never sees, in the same forms as data.source; "
        "`sample` and `div2k` bring their own.",
    )
    download_dir: str | None = Field(
        None,
        description="Folder for div2k's archives, seen by every node; default: photos/ in data.root.",
    )
    div2k_url: str = Field(
        "https://data.vision.ee.ethz.ch/cvl/DIV2K",
        pattern="^https?://.*[^/]$",
        description="Where div2k's archives are, or a mirror; their sha256 is checked.",
    )
    root: str = Field(
        "data", description="The data set's folder (or s3:// prefix): manifest.json and Parquet shards."
    )
    lr_dir: str | None = Field(
        None, description="Low-resolution files to pair with data.source by name, instead of degrading it."
    )
    license: str | None = Field(
        None,
        description="Licence of the photographs, for the manifest; else a LICENSE file beside them is recorded.",
    )
    scale: Annotated[Literal[2, 3, 4], BeforeValidator(_number)] = Field(
        4, description="High-resolution pixels per low-resolution pixel, on a side."
    )
    edge: Literal["replicate", "symmetric"] = Field(
        "replicate", description="How the degradation extends a photograph past its edges."
    )
    patch_px: int = Field(480, ge=16, description="Side of a stored high-resolution patch, in pixels.")
    patch_stride_px: int = Field(
        352, ge=4, description="Distance between patches; patch_px - crop_px loses no reachable crop."
    )
    codec: Literal["raw", "lz4", "zstd", "webp"] = Field(
        "raw", description="How pixels are stored: raw bytes, raw in compressed pages, or lossless WebP."
    )
    shard_mib: int = Field(
        256, ge=1, description="A Parquet shard is closed when it reaches this size, in MiB."
    )
    max_megapixels: float = Field(
        200.0, gt=0, description="Larger photographs are refused, from their header."
    )
    max_rejected_share: float = Field(
        0.1, ge=0, le=1, description="The run fails when a larger share of the photographs is refused."
    )
    min_detail: float = Field(
        0.0,
        ge=0,
        description="Patches with a lower detail score (flat sky, walls) are left out; 0 keeps all.",
    )
    max_corrupt_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Training stops when a larger share of the patches that it met was damaged.",
    )
    feed: Literal["auto", "ray", "thread"] = Field(
        "auto",
        description="How batches reach a worker: through Ray Data, through a prefetch thread in the worker, or "
        "whichever suits the CPUs that the cluster has to spare.",
    )
