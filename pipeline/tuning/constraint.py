"""A condition on a validation metric, such as `psnr_y >= 24.5`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_FORM = re.compile(
    r"\s*([A-Za-z0-9_./-]+)\s*(>=|<=)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"
)


@dataclass(frozen=True)
class Constraint:
    """`metric >= bound` or `metric <= bound`."""

    metric: str
    at_least: bool
    bound: float

    @staticmethod
    def parse(text: str) -> "Constraint":
        """The condition in `text`. Raises ValueError."""
        match = _FORM.fullmatch(text)
        if match is None or math.isinf(float(match[3])):
            raise ValueError(f"constraints: {text!r}: write METRIC >= NUMBER or METRIC <= NUMBER")
        return Constraint(match[1], match[2] == ">=", float(match[3]))

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far the condition is from being met: positive if it is not met. Raises KeyError."""
        difference = self.bound - metrics[self.metric]
        return difference if self.at_least else -difference

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.bound:g}"
