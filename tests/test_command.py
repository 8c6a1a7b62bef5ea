"""How every command ends."""

import errno

import pytest

from pipeline import command
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--hr x: no\nsuch folder"), 2, "error: --hr x: no such folder"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/photos/a.png"),
            2,
            "error: no space left on the device (/data/photos/a.png); free some",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_other_errors_keep_their_traceback_without_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> int:
        raise OSError(errno.EIO, "http://me:geheim@host: Input/output error")

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "OSError: [Errno 5] http://***@host: Input/output error" in printed
    assert "geheim" not in printed
