"""manifest.json: the content of a data set, and the sha256 of every other file in it."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow

from pipeline.errors import UserError
from pipeline.storage import Storage

NAME = "manifest.json"
SCHEMA_VERSION = 2
CODECS = ("raw", "webp")
# The names that ingest gives. Any other name in a manifest could make a reader open a file outside the data set.
SHARD_NAME = re.compile(r"(patches|held_out)-[0-9]{5,}\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# How `encode` writes its last field, and its end. No JSON string contains a newline, so they occur there only.
_SOURCES, _END = b',\n "sources": ', b"\n}\n"


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a data set. Raises ValueError for values that no shard can have."""

    name: str
    rows: int
    bytes: int
    sha256: str
    footer_sha256: str  # of the file's last footer_bytes, so that a reader can trust the offsets in them
    footer_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):
            raise ValueError(
                f"shard name {self.name!r}; expected patches-00000.parquet or held_out-00000.parquet"
            )
        for field in ("rows", "bytes", "footer_bytes"):
            value = getattr(self, field)
            # Every row takes more than a byte, and the footer is a part of the file.
            if type(value) is not int or not 1 <= value <= self.bytes:
                raise ValueError(
                    f"{self.name}: {field}={value!r}; expected an integer from 1 to its size in bytes"
                )
        for field in ("sha256", "footer_sha256"):
            if not _SHA256.fullmatch(str(getattr(self, field))):
                raise ValueError(f"{self.name}: {field} is not a sha256")


@dataclass(frozen=True)
class Manifest:
    """A complete data set. Patch ids are 0..patches-1, in the order of the shards' rows."""

    root: str
    sha256: str  # of the bytes of manifest.json
    scale: int  # high-resolution pixels per low-resolution pixel
    patch_px: int  # side of a high-resolution patch
    codec: str  # encoding of the pixels, one of CODECS
    shards: tuple[Shard, ...]  # of patches
    held_out: tuple[Shard, ...]
    settings: dict[str, Any]
    rejected: tuple[dict[str, Any], ...]  # path, set, reason, bytes
    degradation: dict[str, Any]
    content: bytes  # of manifest.json

    @property
    def patches(self) -> int:
        """Number of patches."""
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def first_ids(self) -> np.ndarray:
        """int64: first patch id of every shard."""
        return np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards])[:-1]]).astype(np.int64)

    def locate(self, patch: int) -> tuple[int, int]:
        """(shard number, row in it) of a patch id."""
        shard = int(np.searchsorted(self.first_ids, patch, side="right")) - 1
        return shard, patch - int(self.first_ids[shard])

    @cached_property
    def sources(self) -> tuple[dict[str, Any], ...]:
        """Of each image: path, set, bytes, sha256, pixels_sha256, height, width, first_patch, patches.

        Parsed on first use: 90 % of the manifest, unused by training.

        Raises:
            UserError: not a list of objects.
        """
        try:
            sources = json.loads(self.content)["sources"]
            if not isinstance(sources, list) or not all(isinstance(entry, dict) for entry in sources):
                raise TypeError("sources is not a list of objects")
        except (TypeError, ValueError) as error:
            raise _not_valid(self.root, error) from None
        return tuple(sources)

    @property
    def held_out_sha256(self) -> str:
        """Digest of the held-out images."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.held_out).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What the data set was made from and how: `source`, `held_out`, `degradation`, `patches`, and the settings."""
        return {
            "source": self._images("train"),
            "held_out": self._images("held_out") or None,
            "degradation": self.degradation.get("kind"),
            "patches": self.patches,
            **self.settings,
        }

    def _images(self, name: str) -> str:
        """Number, first and last path of a set's images in one line; "" where it has none."""
        paths = [str(entry.get("path")) for entry in self.sources if entry.get("set") == name]
        if not paths:
            return ""
        ends = paths if len(paths) < 3 else [paths[0], "...", paths[-1]]
        text = f"{len(paths)} image{'s' * (len(paths) > 1)}: {' '.join(ends)}"
        # File names may hold line breaks and bytes that are not UTF-8.
        return " ".join(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").split())


def encode(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest; the same content always gives the same bytes."""
    return (
        json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=1, sort_keys=True) + "\n"
    ).encode("ascii")


def load_manifest(root: str) -> Manifest:
    """Reads and checks root/manifest.json.

    Raises:
        UserError: missing, corrupt, or of another schema version.
    """
    storage = Storage(root)
    try:
        content = storage.read_bytes(NAME)
    except FileNotFoundError:
        state = "ingest was interrupted; run it again" if storage.exists(".ingest") else "no data set"
        raise UserError(
            f"data.root={root}: {NAME} is missing ({state}): python jobs/prepare_data.py --data.root {root}"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data.root={root}: cannot read {NAME}: {str(error).splitlines()[0]}") from None
    return decode(content, storage.uri)


def has_manifest(root: str) -> bool:
    """Whether a data set exists at `root`. Raises UserError: the object store is unreachable."""
    try:
        return Storage(root).exists(NAME)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data.root={root}: unreachable ({str(error).splitlines()[0]})") from None


def decode(content: bytes, root: str) -> Manifest:
    """The inverse of `encode`. Raises UserError."""
    try:
        end = content.find(_SOURCES)
        raw = json.loads(content[:end] + b"}" if end > 0 else content)
        version = raw["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{root}/{NAME}: schema version {version}, but this release reads {SCHEMA_VERSION}; remove it and "
                "prepare the data set again"
            )
        settings = raw["settings"]
        manifest = Manifest(
            root=root,
            sha256=hashlib.sha256(content).hexdigest(),
            scale=int(settings["scale"]),
            patch_px=int(settings["patch_px"]),
            codec=str(settings["codec"]),
            shards=_shards(raw["shards"], "patches"),
            held_out=_shards(raw["held_out"], "held_out"),
            settings=settings,
            rejected=tuple(raw["rejected"]),
            degradation=raw["degradation"],
            content=content,
        )
        if not manifest.shards:
            raise ValueError("it lists no shards with patches")
        if manifest.codec not in CODECS:
            raise ValueError(f"codec={manifest.codec!r}; expected {' or '.join(CODECS)}")
        if manifest.patches != raw["patches"]:
            raise ValueError(f"patches={raw['patches']}, but the shards contain {manifest.patches}")
        if end < 0 or not content.endswith(_END):
            raise ValueError("it does not end with its sources")
        return manifest
    except (KeyError, TypeError, ValueError) as error:
        raise _not_valid(root, error) from None


def _shards(entries: list[dict[str, Any]], kind: str) -> tuple[Shard, ...]:
    """The shards of one kind. Raises ValueError or TypeError."""
    shards = tuple(Shard(**entry) for entry in entries)
    for shard in shards:
        if not shard.name.startswith(f"{kind}-"):
            raise ValueError(f"{shard.name} is listed among the {kind} shards")
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError(f"a {kind} shard is listed twice")
    return shards


def _not_valid(root: str, error: Exception) -> UserError:
    return UserError(
        f"{root}/{NAME}: not a valid manifest ({type(error).__name__}: {error}); remove it and "
        "prepare the data set again"
    )
