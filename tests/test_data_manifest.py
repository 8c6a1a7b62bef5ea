"""A manifest is read as it was written, or refused in one line with the reason."""

import json
import re
from typing import Any

import pytest

from pipeline.data.format.manifest import Shard, decode, encode
from pipeline.errors import UserError

SHARD = {
    "name": "patches-00000.parquet",
    "rows": 2,
    "bytes": 100,
    "sha256": "a" * 64,
    "footer_sha256": "b" * 64,
    "footer_bytes": 30,
}
CONTENT: dict[str, Any] = {
    "patches": 2,
    "settings": {"scale": 4, "patch_px": 48, "codec": "raw", "edge": "replicate"},
    "degradation": {"kind": "matlab_uint8", "edge": "replicate"},
    "sources": [{"path": 'ein Bild\u00e4\udcff,\n "sources": .png', "set": "train", "patches": 2}],
    "rejected": [{"path": "b.png", "reason": "empty"}],
    "shards": [SHARD],
    "held_out": [],
    "licenses": {},
    "libraries": {"numpy": "2.0"},
}


def test_a_manifest_is_read_as_it_was_written() -> None:
    manifest = decode(encode(CONTENT), "data")
    assert manifest.shards == (Shard(**SHARD),)
    assert (manifest.patches, manifest.scale, manifest.patch_px, manifest.codec) == (2, 4, 48, "raw")
    assert list(manifest.sources) == CONTENT["sources"]
    assert list(manifest.rejected) == CONTENT["rejected"]
    assert (manifest.settings, manifest.degradation) == (CONTENT["settings"], CONTENT["degradation"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSONDecodeError"),
        (encode(CONTENT)[:-40], "does not end with its sources"),
        (encode(CONTENT)[:200], "JSONDecodeError"),
        (b"\xff" + encode(CONTENT), "UnicodeDecodeError"),
        (encode(CONTENT).replace(b'"set":', b'"set"'), "JSONDecodeError"),
        (b"[]", "TypeError"),
        (encode({**CONTENT, "schema_version": 7}), "schema version 7, but this release reads 2"),
        (encode({"schema_version": 7}), "schema version 7, but this release reads 2"),
        (encode({name: value for name, value in CONTENT.items() if name != "shards"}), "KeyError: 'shards'"),
        (
            encode({name: value for name, value in CONTENT.items() if name != "sources"}),
            "end with its sources",
        ),
        (encode({**CONTENT, "shards": [{**SHARD, "lines": 2}]}), "unexpected keyword argument 'lines'"),
        (encode({**CONTENT, "settings": {}}), "KeyError: 'scale'"),
        (
            encode({**CONTENT, "settings": {**CONTENT["settings"], "codec": "lz4"}}),
            "codec='lz4'; expected raw or webp",
        ),
        (encode({**CONTENT, "patches": 3}), "patches=3, but the shards contain 2"),
        (encode({**CONTENT, "sources": {"path": "a.png"}}), "not a list of objects"),
        *(
            (
                encode({**CONTENT, "shards": [{**SHARD, "name": name}]}),
                f"shard name {name!r}; expected patches-",
            )
            for name in (
                "../outside/x.parquet",
                "/x/patches-00000.parquet",
                "s3://b/patches-00000.parquet",
                "",
                3,
            )
        ),
        (
            encode({**CONTENT, "held_out": [{**SHARD, "name": "../held_out-00000.parquet"}]}),
            "shard name '../held_out-00000.parquet'",
        ),
        (
            encode({**CONTENT, "held_out": [SHARD]}),
            "patches-00000.parquet is listed among the held_out shards",
        ),
        (encode({**CONTENT, "patches": 4, "shards": [SHARD, SHARD]}), "listed twice"),
        (encode({**CONTENT, "patches": 0, "shards": []}), "no shards with patches"),
        *(
            (encode({**CONTENT, "patches": rows, "shards": [{**SHARD, "rows": rows}]}), f"rows={rows!r}")
            for rows in (-2, 0, 101, 2.0, True)
        ),
        (encode({**CONTENT, "shards": [{**SHARD, "rows": 5}, {**SHARD, "rows": -3}]}), "rows=-3"),
        (encode({**CONTENT, "shards": [{**SHARD, "footer_bytes": 101}]}), "footer_bytes=101"),
        (encode({**CONTENT, "shards": [{**SHARD, "bytes": "100"}]}), "TypeError"),
        (encode({**CONTENT, "shards": [{**SHARD, "sha256": "A"}]}), "sha256 is not a sha256"),
    ],
)
def test_an_invalid_manifest_is_refused_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        _ = decode(content, "data").sources
    assert str(caught.value).startswith("data/manifest.json: ")
    assert "\n" not in str(caught.value)


def test_equal_content_gives_equal_bytes() -> None:
    shuffled = dict(reversed(CONTENT.items()))
    assert encode(shuffled) == encode(CONTENT)
    assert json.loads(encode(CONTENT)) == {"schema_version": 2, **CONTENT}
