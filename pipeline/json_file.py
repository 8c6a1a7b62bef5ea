"""A JSON file of a known type: one way to read and write it, and one policy for a corrupt one."""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UserError
from pipeline.storage import Storage

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JsonFile(Generic[T]):
    """One kind of JSON file: a dataclass (or a list of them) at a fixed path below a folder."""

    path: str
    """Below the run's folder; may have fields for `str.format`, filled by `at`."""
    type: Any
    """Dataclass, or `list[dataclass]`, of the content."""
    purpose: str
    remedy: str = ""
    """What the user can do when the file is corrupt; empty: a corrupt file is ignored."""

    def at(self, **names: str) -> "JsonFile[T]":
        """The file at a path with its fields filled in."""
        return dataclasses.replace(self, path=self.path.format(**names))

    def read(self, folder: Storage) -> T | None:
        """The content; None if the file does not exist. A corrupt file without a remedy is ignored with a warning.

        Raises:
            UserError: the file is corrupt, with its path, what is wrong and the remedy.
        """
        try:
            return self.parse(folder.read_bytes(self.path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            message = f"{folder.path(self.path)}: corrupt ({error})"
            if self.remedy:
                raise UserError(f"{message}; {self.remedy}") from None
            logger.warning("%s; ignored", message)
            return None

    def parse(self, content: bytes) -> T:
        """The content of a file's bytes. Raises ValueError in one line: not JSON, or not of this type."""
        try:
            value: T = TypeAdapter(self.type).validate_python(json.loads(content))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ValueError(f"{name}: {first['msg']}" if name else first["msg"]) from None
        return value

    def dump(self, value: T) -> bytes:
        """The file's bytes for a content."""
        plain = TypeAdapter(self.type).dump_python(value)
        return json.dumps(plain, indent=2, ensure_ascii=False).encode()

    def write(self, folder: Storage, value: T) -> None:
        """Writes the file atomically. Raises OSError."""
        folder.write_bytes(self.path, self.dump(value))

    def remove(self, folder: Storage) -> None:
        """Removes the file if it exists."""
        folder.remove(self.path)


def json_text(value: Any) -> str:
    """`value` as indented JSON with a final line break; JSON has no NaN and infinity, so these become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
