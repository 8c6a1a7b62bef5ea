"""A real S3 server in this process, for tests of object storage."""

import functools
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

BUCKET = "images"


def start_server() -> "ThreadedMotoServer":
    """Starts moto's server on a free port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server


# Stopping one takes half a second; its thread does not keep the process alive.
_shared_server = functools.cache(start_server)


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch, server: "ThreadedMotoServer | None" = None) -> Iterator[str]:
    """Points the environment to a server (that of this process), and gives the address of its only, empty bucket."""
    host, port = (server or _shared_server()).get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for method, path in (("POST", "moto-api/reset"), ("PUT", BUCKET)):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", method=method), timeout=60).close()
    yield f"s3://{BUCKET}"
