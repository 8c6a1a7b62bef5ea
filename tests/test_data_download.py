"""DIV2K by name: downloads resume after any interruption; only the published file gets the name."""

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
    """Serves files; applies each of `tricks` to one request, then responds normally."""

    files: dict[str, bytes]
    tricks: list[str] = field(default_factory=list)
    forever: str = ""
    requests: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.ingest.download._PAUSE_S", 0)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server({"a.zip": CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.requests.append(wanted)
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
            if trick == "length too large":
                length += 1000
            if trick == "length too small":
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
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))  # its shutdown waits that long
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def get(server: Server, folder: Path, archive: Archive = ARCHIVE) -> Path:
    return download(archive, server.url, folder)


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    assert missing_bytes(ARCHIVE, tmp_path) == len(CONTENT)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert get(server, tmp_path) == tmp_path / "a.zip"
    assert server.requests == [""]
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
        ["length too large"],
        ["length too small"],
        ["break", "length too large"],
        ["break", "length too small"],
        ["stall", "break", "stall"],
        ["page"],
    ],
)
def test_the_download_survives_interrupted_and_wrong_responses(
    server: Server, tmp_path: Path, tricks: list[str]
) -> None:
    server.tricks = list(tricks)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_the_next_process_resumes_where_the_last_one_stopped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.zip.partial").write_bytes(CONTENT[:123_456])
    assert missing_bytes(ARCHIVE, tmp_path) == len(CONTENT) - 123_456
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=123456-"]


@pytest.mark.parametrize("partial", [bytes(5000), CONTENT + b"more", bytes(len(CONTENT))])
def test_a_wrong_partial_file_is_downloaded_again(server: Server, tmp_path: Path, partial: bytes) -> None:
    (tmp_path / "a.zip.partial").write_bytes(partial)
    assert get(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("other", "its sha256 is .* not the published file"),
        ("404", "HTTP status 404"),
        ("503", r"HTTP status 503 .*\(no data received in 5 attempts\); run again to resume"),
        ("page", "has 26 bytes, expected 300000"),
        ("stall", "the connection ended at byte 0 of 300000"),
        ("endless", "sends more than 300000 bytes"),
    ],
)
def test_a_permanent_failure_is_one_line_and_leaves_no_file(
    server: Server, tmp_path: Path, trick: str, message: str
) -> None:
    server.forever = trick
    with pytest.raises(UserError, match=message):
        get(server, tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_an_unreachable_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.zip: .*refused.*5 attempts"):
        download(ARCHIVE, "http://127.0.0.1:9", tmp_path)


def archive_of(name: str, numbers: range) -> tuple[bytes, Archive]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{name}/", b"")
        for number in numbers:
            content = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (64, 72, 3), np.uint8)
            Image.fromarray(pixels).save(content, "PNG")
            file.writestr(f"{name}/{number:04d}.png", content.getvalue())
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
    result = prepare(data, on_ray=False)
    assert (result.patches, result.sources) == (4 * 2, 6)
    manifest = load_manifest(data.root)
    assert [entry["path"] for entry in manifest.sources][:3] == [
        "DIV2K_valid_HR/0801.png",
        "DIV2K_valid_HR/0802.png",
        "DIV2K_train_HR/0001.png",
    ]
    # Complete: the archives are not downloaded again, even after they were deleted.
    for path in (tmp_path / "data" / "photos").iterdir():
        path.unlink()
    server.requests.clear()
    assert prepare(data, on_ray=False) == result
    assert server.requests == []


def test_div2k_into_an_object_store_needs_a_folder() -> None:
    data = DataConfig(source="div2k", root="s3://bucket/data")
    with pytest.raises(UserError, match=r"set data\.download_dir"):
        make_plan(data)


def test_too_little_space_for_div2k_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.Storage.free_bytes", lambda self: 10 * 2**30)
    with pytest.raises(UserError, match=r"10\.0 GiB free, and patches take about 1\d\.\d GiB"):
        check_source(DataConfig(source="div2k", root=str(tmp_path)))
