"""A place is checked before the work, and the check leaves nothing behind."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import Storage


@pytest.mark.parametrize("name", ["there", "not/there/yet"])
def test_the_check_for_writing_leaves_neither_file_nor_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    storage = Storage(str(tmp_path / name))
    storage.require_writable("data.root")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]
    storage.write_bytes("sub/file", b"content")
    assert storage.read_bytes("sub/file") == b"content"


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "new/" + "x" * 300])
def test_a_place_where_no_folder_can_be_is_named_with_its_field(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.root=.*cannot write there") as caught:
        Storage(str(tmp_path / name)).require_writable("data.root")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_with_its_field(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"data\.root=.*Permission denied"):
        Storage(str(tmp_path / "new")).require_writable("data.root")


def test_free_space_is_that_of_the_disk_where_the_folder_will_lie(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "not" / "yet"))
    assert storage.nearest_folder() == str(tmp_path)
    assert storage.free_bytes()
    assert Storage("s3://bucket/prefix").free_bytes() is None
