"""Warnings about runs that are unhealthy but do not fail."""

from collections import deque
from collections.abc import Mapping

DATA_WAIT_SHARE = 0.2
INTERVALS = 5
"""Consecutive intervals before a warning fires."""
WINS, LOSES = 0.98, 0.52
STUCK_SPREAD = 1e-4


class Advisor:
    """Emits each warning once and re-arms it when the condition clears."""

    def __init__(self) -> None:
        self._recent: deque[Mapping[str, float]] = deque(maxlen=INTERVALS)
        self._active: set[str] = set()

    def update(self, values: Mapping[str, float]) -> list[str]:
        """New warnings after an interval; `values` are those of `Meter.finish`."""
        self._recent.append(values)
        if len(self._recent) < INTERVALS or set(self._recent[0]) != set(values):
            return []
        warnings = self._warnings()
        new = [text for kind, text in warnings.items() if kind not in self._active]
        self._active = set(warnings)
        return new

    def _warnings(self) -> dict[str, str]:
        """The warnings whose condition holds, by kind."""
        accuracy, pixel, wait = map(self._all, ("discriminator_accuracy", "loss_pixel", "data_wait_share"))
        warnings = {}
        if min(wait) > DATA_WAIT_SHARE:
            warnings["wait"] = (
                f"steps wait {wait[-1]:.0%} of the time for data; give the workers more CPUs (cpus_per_worker), "
                "or put data.root on a faster disk"
            )
        if max(pixel) - min(pixel) <= STUCK_SPREAD * max(pixel):
            warnings["stuck"] = (
                f"the pixel loss has not changed for {INTERVALS} intervals ({pixel[-1]:.4g}); raise the learning rate"
            )
        if accuracy and min(accuracy) > WINS:
            warnings["wins"] = (
                f"the discriminator accuracy is {accuracy[-1]:.0%}: the generator cannot follow it; "
                "lower gan.discriminator_learning_rate, for example to a tenth, or train stage 1 longer"
            )
        if accuracy and max(accuracy) < LOSES:
            warnings["loses"] = (
                f"the discriminator accuracy is {accuracy[-1]:.0%}, close to chance level: it adds noise rather "
                "than detail; raise gan.discriminator_learning_rate"
            )
        return warnings

    def _all(self, name: str) -> list[float]:
        return [values[name] for values in self._recent if name in values]
