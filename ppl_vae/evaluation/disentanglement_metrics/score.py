"""One score of codes against factors."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Score:
    """A score of codes against factors, with what it was computed with.

    Attributes:
        value: the score; the higher the better.
        standard_error: how far new data of that number would move it, as each score's function says; NaN
            where that is not known.
        settings: the arguments that it depends on.

    Example:
        >>> print(Score(0.5, 0.01, {"bins": 20}))
        0.500 +- 0.010
    """

    value: float
    standard_error: float = math.nan
    settings: dict[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.3f}"
        return f"{self.value:.3f}{error}"
