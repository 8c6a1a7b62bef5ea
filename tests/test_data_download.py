"""DIV2K by name: downloads go on after anything, and nothing but the published file gets the name."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import check_source, load_manifest, prepare
from pipeline.data.config import DataConfig
from pipeline.data.ingest.download import Archive, download, missing_bytes
from pipeline.data.ingest.plan import make_plan
from pipeline.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)
ARCHIVE = Archive("a.zip", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@dataclass
class Server:
    """Serves files; does each of `tricks` once, one per request, then behaves."""

    files: dict[str, bytes]
    tricks: list[str] = field(default_factory=list)
    forever: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server({"a.zip": CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append(wanted)
            trick = state.tricks.pop(0) if state.tricks else state.forever
            content = state.files.get(self.path.strip("/"))
            if content is None or trick == "404":
                self.send_error(404)
                return
            if trick == "503":
                self.send_error(503)
                return
            if trick == "other":
                content = bytes(len(content))
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if trick == "ignore":
                first = 0
            if first >= len(content):
                self.send_error(416)
                return
            body = content[first:]
            length = len(body)
            if trick == "says more":
                length += 1000
            if trick == "says less":
                length -= 1000
            if trick == "page":
                body = b"<html>please log in</html>"
                length = len(body)
            self.send_response(206 if first else 200)
            if first:
                last = len(content) - 1
                start = first + 5 if trick == "shifted" else first
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            if trick != "endless":
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if trick == "break":
                body = body[:100_000]
            if trick == "stall":
                body = b""
            self.wfile.write(body if trick != "endless" else body + bytes(5000))

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def get(server: Server, folder: Path, archive: Archive = ARCHIVE) -> Path:
    return download(archive, server.url, folder, progress=False, pause_s=0)


def test_a_file_arrives_once(server: Server, tmp_path: Path) -> None:
    assert missing_bytes(ARCHIVE, tmp_path) == len(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert get(server, tmp_path) == tmp_path / "a.zip"
    assert server.asked == [""]
    assert missing_bytes(ARCHIVE, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    "tricks",
    [
        ["break"],
        ["break", "break"],
        ["503", "break", "503"],
        ["break", "ignore"],
        ["break", "shifted"],
        ["says more"],
        ["says less"],
        ["break", "says more"],
        ["break", "says less"],
        ["stall", "break", "stall"],
        ["page"],
    ],
)
def test_a_server_that_breaks_off_or_lies_for_a_while_is_survived(
    server: Server, tmp_path: Path, tricks: list[str]
) -> None:
    server.tricks = list(tricks)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_the_next_process_goes_on_where_the_last_one_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.partial").write_bytes(CONTENT[:123_456])
    assert missing_bytes(ARCHIVE, tmp_path) == len(CONTENT) - 123_456
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=123456-"]


@pytest.mark.parametrize("there", [bytes(5000), CONTENT + b"more", bytes(len(CONTENT))])
def test_a_wrong_beginning_is_fetched_anew(server: Server, tmp_path: Path, there: bytes) -> None:
    (tmp_path / "a.zip.partial").write_bytes(there)
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("other", "its sha256 is .* not the published file"),
        ("404", "the server answers 404"),
        ("503", r"the server answers 503 .*\(5 tries brought nothing\); run again to go on"),
        ("page", "says that it has 26 bytes, not 300000"),
        ("stall", "the connection ended at byte 0 of 300000"),
        ("endless", "sends more than 300000 bytes"),
    ],
)
def test_what_stays_wrong_is_one_line_and_never_gets_the_name(
    server: Server, tmp_path: Path, trick: str, message: str
) -> None:
    server.forever = trick
    with pytest.raises(UserError, match=message):
        get(server, tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_nobody_at_the_address_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.zip: .*refused.*5 tries"):
        download(ARCHIVE, "http://127.0.0.1:9", tmp_path, progress=False, pause_s=0)


def archive_of(name: str, numbers: range) -> tuple[bytes, Archive]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{name}/", b"")
        for number in numbers:
            picture = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (64, 72, 3), np.uint8)
            Image.fromarray(pixels).save(picture, "PNG")
            file.writestr(f"{name}/{number:04d}.png", picture.getvalue())
    content = buffer.getvalue()
    return content, Archive(f"{name}.zip", len(content), hashlib.sha256(content).hexdigest())


def test_div2k_by_name_becomes_a_data_set(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, name, numbers in (
        ("DIV2K_TRAIN", "DIV2K_train_HR", range(1, 5)),
        ("DIV2K_HELD_OUT", "DIV2K_valid_HR", range(801, 803)),
    ):
        content, archive = archive_of(name, numbers)
        server.files[archive.name] = content
        monkeypatch.setattr(f"pipeline.data.ingest.plan.{constant}", archive)
    data = DataConfig(
        source="div2k", root=str(tmp_path / "data"), div2k_url=server.url, patch_px=64, patch_stride_px=64
    )
    check_source(data)
    result = prepare(data, progress=False, on_ray=False)
    assert (result.patches, result.sources) == (4 * 2, 6)
    manifest = load_manifest(data.root)
    assert [entry["path"] for entry in manifest.sources][:3] == [
        "DIV2K_valid_HR/0801.png",
        "DIV2K_valid_HR/0802.png",
        "DIV2K_train_HR/0001.png",
    ]
    # Complete: the archives are not asked for again, not even when they are gone.
    for path in (tmp_path / "data" / "photos").iterdir():
        path.unlink()
    server.asked.clear()
    assert prepare(data, progress=False, on_ray=False) == result
    assert server.asked == []


def test_div2k_into_an_object_store_needs_a_folder() -> None:
    data = DataConfig(source="div2k", root="s3://bucket/data")
    with pytest.raises(UserError, match=r"set data\.download_dir"):
        make_plan(data, progress=False)


def test_too_little_space_for_div2k_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.Storage.free_bytes", lambda self: 10 * 2**30)
    with pytest.raises(UserError, match=r"10\.0 GiB free, and patches take about 1\d\.\d GiB"):
        check_source(DataConfig(source="div2k", root=str(tmp_path)))
