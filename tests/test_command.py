"""Exit codes and errors of every command."""

import errno
import re
from typing import Literal

import pytest
from pydantic import Field

from pipeline import command
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.section import Section


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
def test_errors_that_a_user_can_fix_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


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


class ExampleConfig(Section):
    source: str = Field(description="Input.", json_schema_extra={"metavar": "DIR"})
    model: tuple[str, ...] = Field((), description="Models.", json_schema_extra={"nargs": "+"})
    mix: tuple[tuple[str, float], ...] = Field((), json_schema_extra={"nargs": 2, "action": "append"})
    tile_px: int | None = Field(None, ge=0, description="Tile side.")
    form: Literal["png", "webp"] = Field("png", description="Format.")
    store: str | None = Field(None, json_schema_extra={"flag": "--tracking.uri"})


def parsed(*argv: str, **environment: str) -> ExampleConfig:
    return command.parse_section("upscale", ExampleConfig, argv, "Example.", environment)


def test_flags_are_made_from_the_fields_of_a_section() -> None:
    assert parsed("--source", "a") == ExampleConfig(source="a")
    config = parsed(
        "--source=a", "--model", "x,1", "y", "--mix", "u", "0.5", "--tracking.uri", "s", "--tile-px", "8"
    )
    assert (config.model, config.mix, config.store, config.tile_px) == (("x,1", "y"), (("u", 0.5),), "s", 8)


def test_a_flag_takes_precedence_over_the_environment() -> None:
    environment = {
        "ESRGAN_UPSCALE__SOURCE": "e",
        "ESRGAN_UPSCALE__MODEL": '["x"]',
        "ESRGAN_MODEL__NUM_BLOCK": "2",
    }
    assert parsed(**environment) == ExampleConfig(source="e", model=("x",))
    assert parsed("--source", "f", **environment).source == "f"
    assert load_config([], description="", environment=environment)[0].model.num_block == 2


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        ([], {}, "the following arguments are required: --source"),
        (["--source", "a", "--tile-px", "-1"], {}, "--tile-px='-1': should be greater than or equal to 0"),
        (["--source", "a", "--tile-pix", "1"], {}, "did you mean --tile-px?"),
        (["--source", "a", "--mix", "u", "x"], {}, "--mix='x': should be a valid number"),
        (["--source", "a", "--form", "gif"], {}, "--form: invalid choice: 'gif'"),
        (["--source", "a"], {"ESRGAN_UPSCALE__FORM": "gif"}, "environment: --form='gif'"),
        (["--source", "a"], {"ESRGAN_UPSCALE__MODEL": "[x]"}, "ESRGAN_UPSCALE__MODEL=[x]: not a JSON list"),
        (["--source", "a"], {"ESRGAN_UPSCALE__TILE": "1"}, "environment: tile: no such field; did you mean tile_px?"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(argv: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parsed(*argv, **environment)


def test_help_lists_fields_in_order_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    assert (
        text.index("--source DIR Input.")
        < text.index("--model")
        < text.index("--form {png,webp} Format (default: png).")
    )
