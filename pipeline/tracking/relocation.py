"""Follows a SQLite database whose folder was moved: MLflow records absolute paths of artifacts in it."""

import sqlite3
from contextlib import closing
from pathlib import Path

from pipeline.errors import UserError

ARTIFACTS = "mlartifacts"
# Tables and columns with addresses of artifacts, in MLflow 3.17.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow_moved_database(uri: str) -> None:
    """Rewrites the addresses of artifacts that were next to the database at an earlier place; prints both places.

    The earlier folder is kept if there is none next to the database. Other databases than SQLite are left unchanged.

    Raises:
        UserError: the database cannot be written; names both places.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not file.is_file():
        return
    new = str(file.parent / ARTIFACTS)
    with closing(sqlite3.connect(file, timeout=30)) as database:
        for old in _earlier_places(database, new):
            # Without the new folder the files are at the earlier place, or on a disk that is not mounted.
            if not Path(new).is_dir() or (Path(old).is_dir() and Path(old).samefile(new)):
                continue
            try:
                with database:
                    for table, column in _ADDRESSES:
                        database.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, length(?) + 1) "
                            f"WHERE {column} = ? OR substr({column}, 1, length(?) + 1) = ? || '/'",
                            (new, old, old, old, old),
                        )
            except sqlite3.OperationalError as error:
                raise UserError(
                    f"tracking.uri={uri}: its files were recorded in {old} and are now in {new}, but the database "
                    f"cannot be updated ({error}); make it writable, or move the folder back"
                ) from None
            print(f"note: {file}: its files were recorded in {old}; {new} is used from now on", flush=True)


def _earlier_places(database: sqlite3.Connection, new: str) -> list[str]:
    try:
        rows = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    except sqlite3.DatabaseError:
        return []  # not MLflow's, or without tables yet
    return [
        row[0]
        for row in rows
        if row[0] and row[0].endswith(f"/{ARTIFACTS}") and row[0] != new and row[0][0] == "/"
    ]
