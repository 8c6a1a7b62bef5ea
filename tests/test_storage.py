"""Local folders and object stores: addresses, credentials, the check for writing."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import Storage


@pytest.mark.parametrize("name", ["there", "not/there/yet"])
def test_the_write_check_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    storage = Storage(str(tmp_path / name))
    storage.require_writable("data.root")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]
    storage.write_bytes("sub/file", b"content")
    assert storage.read_bytes("sub/file") == b"content"


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "new/" + "x" * 300])
def test_a_folder_that_cannot_be_made_is_refused_with_its_field(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.root=.*not writable") as caught:
        Storage(str(tmp_path / name)).require_writable("data.root")
    assert "\n" not in str(caught.value)


def test_a_path_below_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(str(tmp_path / "file"))
    assert not storage.exists("below")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("below")
    storage.remove("below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_with_its_field(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"data\.root=.*Permission denied"):
        Storage(str(tmp_path / "new")).require_writable("data.root")


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "not" / "yet"))
    assert storage.nearest_folder() == str(tmp_path)
    assert storage.free_bytes()
    assert Storage("s3://bucket/prefix").free_bytes() is None


@pytest.mark.parametrize(
    ("uri", "kind", "base"),
    [
        ("s3://bucket/runs/", "s3", "bucket/runs"),
        ("gs://bucket/runs", "gcs", "bucket/runs"),
        ("abfs://container@account.dfs.core.windows.net/runs", "abfs", "container/runs"),
        ("abfs://container/runs", "abfs", "container/runs"),
    ],
)
def test_object_stores_are_addressed_by_scheme(
    monkeypatch: pytest.MonkeyPatch, uri: str, kind: str, base: str
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # no look-up of Google's credentials
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    filesystem, path = Storage(uri).filesystem()
    assert (filesystem.type_name, path) == (kind, base)
    assert Storage(uri).remote


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/runs",
        "gs://key@bucket/runs",
        "abfs://container:secret@account.dfs.core.windows.net/runs",
        "abfs://container@account.dfs.core.windows.net/runs?sig=secret",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match="remove keys and options from the address") as caught:
        Storage(uri).filesystem()
    assert "secret" not in str(caught.value)
    assert "key@" not in str(caught.value)


def test_an_azure_account_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(UserError, match="set AZURE_STORAGE_ACCOUNT"):
        Storage("abfs://container/runs").filesystem()


def test_another_scheme_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"ftp://host/runs: use a folder or an s3://, gs:// or abfs:// prefix"
    ):
        Storage("ftp://host/runs")
