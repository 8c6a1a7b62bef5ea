"""The one error that a user causes and can fix, and the removal of secrets from text."""

import re
from importlib.util import find_spec

MASK = "***"
# A password may hold / and @, so what has a colon extends to the last @.
_USER_INFO = re.compile(r"(?<=://)(?:[^/@:\s'\"]*:[^\s'\"]*|[^/@\s'\"]+)(?=@)")
_SECRET_OPTION = re.compile(r"(?i)(?<=[?&;])([a-z_]*(?:password|passwd|pwd|token|secret)[a-z_]*)=[^&;\s'\"]+")


def without_secrets(text: str) -> str:
    """`text` with user names and passwords in addresses replaced by ***."""
    return _SECRET_OPTION.sub(rf"\1={MASK}", _USER_INFO.sub(MASK, text))


class UserError(Exception):
    """Bad input: one clear line (the file or field, its value, what to do) and exit code 2.

    The message never holds the password of an address. Anything else that is raised is a fault of the code, or of the
    machine, and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return find_spec(package) is not None


def require_package(package: str, needed_for: str, instead: str) -> None:
    """Raises UserError if a package is not installed.

    `needed_for` is the field with its value, and `instead` how to do without the package: "set workers=0".
    """
    if not is_installed(package):
        raise UserError(f"{needed_for}: the package {package} is not installed; install it, or {instead}")


class StorageFull(UserError):
    """The storage cannot be written, on a full disk for instance; the same command resumes once it can."""
