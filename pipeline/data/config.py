"""Configuration section of the data set: source, patches, shards and feed."""

from typing import Literal

from pydantic import Field

from pipeline.section import Section


class DataConfig(Section):
    """The data set: its source, its patches on disk, and the feed."""

    source: str | None = Field(
        None,
        description="Images to train on: a folder, a glob, a .zip, an s3:// prefix, `sample` (images from installed "
        "packages) or `div2k` (downloads the official archives, 4 GB).",
    )
    held_out: str | None = Field(
        None,
        description="Images for validation, not used in training, in the same forms as data.source; `sample` and "
        "`div2k` include a held-out set.",
    )
    download_dir: str | None = Field(
        None,
        description="Folder for div2k's archives, shared by all nodes; default: photos/ in data.root.",
    )
    div2k_url: str = Field(
        "https://data.vision.ee.ethz.ch/cvl/DIV2K",
        pattern="^https?://.*[^/]$",
        description="URL of div2k's archives or of a mirror; their sha256 is checked.",
    )
    root: str = Field(
        "data", description="The data set's folder (or s3:// prefix): manifest.json and Parquet shards."
    )
    lr_dir: str | None = Field(
        None, description="Low-resolution files to pair with data.source by name, instead of downscaling it."
    )
    license: str | None = Field(
        None,
        description="License of the images, for the manifest; default: a LICENSE file next to them.",
    )
    scale: int = Field(4, ge=2, le=4, description="Downscaling factor between high and low resolution.")
    edge: Literal["replicate", "symmetric"] = Field(
        "replicate", description="Padding of the image in the degradation: repeat the edge or mirror."
    )
    patch_px: int = Field(480, ge=16, description="Side of a stored high-resolution patch, in pixels.")
    patch_stride_px: int = Field(
        352,
        ge=4,
        description="Stride between patches, in pixels. patch_px - crop_px keeps every crop reachable.",
    )
    codec: Literal["raw", "webp"] = Field(
        "raw", description="Encoding of the pixels: raw bytes (fast), or lossless WebP (half the size)."
    )
    shard_mib: int = Field(
        256,
        ge=1,
        description="A Parquet shard is closed after the image with which it reaches this size, in MiB.",
    )
    max_megapixels: float = Field(200.0, gt=0, description="Larger images are rejected, from their header.")
    max_rejected_share: float = Field(
        0.1, ge=0, le=1, description="The ingest fails if a larger share of the images is rejected."
    )
    min_detail: float = Field(
        0.0,
        ge=0,
        description="Patches with a lower detail score (flat sky, walls) are excluded; 0 keeps all.",
    )
    max_corrupt_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Training stops if a larger share of the patches read so far was corrupt.",
    )
    feed: Literal["auto", "ray", "thread"] = Field(
        "auto",
        description="Source of a worker's batches: a prefetch thread in the worker, Ray Data, or (auto) Ray Data if "
        "the patches are WebP or in an object store, and the cluster has spare CPUs.",
    )
    local_cache: str | None = Field(
        None,
        description="Folder on every node's own disk for a verified copy of a remote data.root, made once per node; "
        "the prefetch thread reads it.",
    )
