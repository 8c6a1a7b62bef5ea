"""A storage folder that was moved, and paths that a SQLite address cannot hold."""

import shutil
from pathlib import Path

import pytest
from tracking_helpers import client_of, new_database, open_small, register, small_generator

from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.lookup import pull_generator
from pipeline.tracking.uri import absolute_uri, resolve_uri


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The new place of a database with a registered generator; the old one is gone."""
    old, new = tmp_path / "old", tmp_path / "new"
    uri = new_database(old)
    tracked = open_small(TrackingConfig(uri=uri), Storage(str(old / "run")), "a")
    small_generator(tmp_path / "g.safetensors", 1)
    register(tracked, tmp_path / "g.safetensors", 1, {"psnr_y": 30.0})
    shutil.move(old, new)
    return new


def test_a_moved_database_is_read_and_written_at_its_new_place(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{moved}/mlflow.db"
    old = moved.parent / "old"
    path = pull_generator("models:/esrgan-x4@champion", uri)
    assert path.is_relative_to(moved)
    output = capsys.readouterr().out
    places = f"its files were recorded in {old}/mlartifacts; {moved}/mlartifacts is used from now on"
    assert output == f"note: {moved}/mlflow.db: {places}\n"
    tracked = open_small(TrackingConfig(uri=uri), Storage(str(moved / "second")), "b")
    client_of(tracked).log_text(tracked.run_id, "text", "file.txt")
    assert (moved / "mlartifacts" / tracked.run_id / "artifacts" / "file.txt").exists()
    assert not old.exists()
    assert capsys.readouterr().out == ""


def test_a_copied_database_uses_its_own_files(moved: Path) -> None:
    shutil.copytree(moved, moved.parent / "copy")
    pull_generator("models:/esrgan-x4@champion", f"sqlite:///{moved}/mlflow.db")
    path = pull_generator("models:/esrgan-x4@champion", f"sqlite:///{moved.parent}/copy/mlflow.db")
    assert path.is_relative_to(moved.parent / "copy")


def test_a_database_moved_without_its_files_uses_those_at_the_old_place(moved: Path) -> None:
    pull_generator("models:/esrgan-x4@champion", f"sqlite:///{moved}/mlflow.db")
    (moved.parent / "alone").mkdir()
    shutil.move(moved / "mlflow.db", moved.parent / "alone" / "mlflow.db")
    path = pull_generator("models:/esrgan-x4@champion", f"sqlite:///{moved.parent}/alone/mlflow.db")
    assert path.is_relative_to(moved)


def test_a_folder_that_is_missing_for_a_while_is_not_replaced(moved: Path) -> None:
    uri = f"sqlite:///{moved.parent}/alone/mlflow.db"
    pull_generator("models:/esrgan-x4@champion", f"sqlite:///{moved}/mlflow.db")
    (moved.parent / "alone").mkdir()
    shutil.move(moved / "mlflow.db", moved.parent / "alone" / "mlflow.db")
    (moved / "mlartifacts").rename(moved / "unmounted")
    with pytest.raises(UserError):
        pull_generator("models:/esrgan-x4@champion", uri)
    (moved / "unmounted").rename(moved / "mlartifacts")
    assert pull_generator("models:/esrgan-x4@champion", uri).is_relative_to(moved)


@pytest.mark.parametrize("name", ["a?b", "50%25", "a#b"])
def test_a_path_that_sqlite_addresses_cannot_hold_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="cannot hold; choose another folder"):
        resolve_uri(TrackingConfig(), str(tmp_path / name))
    with pytest.raises(UserError, match="cannot hold; choose another folder"):
        absolute_uri(f"sqlite:///{tmp_path}/{name}/mlflow.db")
    assert list((tmp_path / name).iterdir()) == []
