"""A step on two CUDA streams has no race: checked on the CPU, by which operation reads and writes which memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu import SmallFeatures, batch_of, small_config, state_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.training import step

MAIN, SIDE = 0, 1


class Streams(TorchDispatchMode):
    """Replaces `side_stream` and `join_side_stream`; finds what one stream uses before it waited for the other."""

    def __init__(self, *, forks: bool = True, joins: bool = True) -> None:
        super().__init__()
        self.races: list[str] = []
        self.on_side = 0
        """Operations of the side stream."""
        self._forks, self._joins = forks, joins
        self._stream = MAIN
        self._time = [0, 0]
        """Operations of each stream so far."""
        self._waited = [[0, 0], [0, 0]]
        """Up to which operation of the other stream each has waited."""
        self._written: dict[int, tuple[int, int]] = {}
        """Stream and time of the last operation that wrote a storage, by its address."""
        self._read: dict[int, list[tuple[int, int]]] = {}
        self._kept: list[Tensor] = []  # so that no address is used twice

    @contextmanager
    def side(self, device: torch.device) -> Iterator[None]:
        if self._forks:
            self._waited[SIDE][MAIN] = self._time[MAIN]
        self._stream = SIDE
        try:
            yield
        finally:
            self._stream = MAIN

    def join(self, device: torch.device) -> None:
        if self._joins:
            self._waited[MAIN][SIDE] = self._time[SIDE]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self._time[self._stream] += 1
        self.on_side += self._stream == SIDE
        given = [value for value in tree_leaves((arguments, options)) if isinstance(value, Tensor)]
        changed = []
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = arguments[index] if index < len(arguments) else (options or {}).get(argument.name)
                changed += [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        used = {value.untyped_storage().data_ptr() for value in given}
        new = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self._kept += new
        written = {value.untyped_storage().data_ptr() for value in changed}
        for place in used:
            self._check(function, [self._written[place]] if place in self._written else [])
            self._read.setdefault(place, []).append((self._stream, self._time[self._stream]))
        for place in written:
            self._check(function, self._read.get(place, []))
        for place in written | {value.untyped_storage().data_ptr() for value in new} - used:
            self._written[place] = self._stream, self._time[self._stream]
        return result

    def _check(self, function: Any, earlier: list[tuple[int, int]]) -> None:
        for stream, time in earlier:
            if stream != self._stream and time > self._waited[self._stream][stream]:
                self.races.append(str(function))


def streams_of_a_step(monkeypatch: pytest.MonkeyPatch, streams: Streams, **changes: Any) -> Streams:
    discriminator = changes.pop("discriminator", "vgg")
    config = small_config(discriminator)
    gan = config.gan.model_copy(update=changes.pop("gan", {}))
    config = config.model_copy(update={"gan": gan, **changes})
    state = state_of("gan", "cpu", discriminator=discriminator)
    monkeypatch.setattr(step, "side_stream", streams.side)
    monkeypatch.setattr(step, "join_side_stream", streams.join)
    with streams:
        for index in range(2):
            step.gan_step(state, batch_of(index, "cpu", torch.float32), SmallFeatures(), config, 1e-3)
    return streams


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"discriminator": "unet"},
        {"gan": {"loss": "vanilla"}},
        {"gan": {"perceptual_weight": 0.0}},
        {"gan": {"ms_ssim_weight": 0.1}},
    ],
    ids=str,
)
def test_no_stream_uses_what_the_other_is_still_writing(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    streams = streams_of_a_step(monkeypatch, Streams(), **changes)
    assert streams.races == []
    assert streams.on_side > 10


@pytest.mark.parametrize("missing", ["forks", "joins"])
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    assert streams_of_a_step(monkeypatch, Streams(**{missing: False})).races
