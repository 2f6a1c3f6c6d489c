"""The score of a run: accuracy, or bits per byte or token of a text."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Score(NamedTuple):
    """A measure of a run, and how it is written.

    Attributes:
      key: Its name among what an evaluation measures.
      label: Its name for people.
      unit: Of the values shown, which are `scale` times those measured; may be empty.
      scale: 100 where a fraction is shown in percent.
      digits: Digits shown after the point.
      is_loss: Whether lower is better; it is then the loss in other units.
    """

    key: str
    label: str
    unit: str
    scale: float
    digits: int
    is_loss: bool

    def value(self, measured: Mapping[str, Any]) -> float:
        """Returns the number shown."""
        return self.scale * measured[self.key]

    def rank(self, measured: Mapping[str, Any]) -> float:
        """Returns a number that is higher where the run is better."""
        return self.better(self.value(measured))

    def better(self, difference: float) -> float:
        """Returns a difference of two values, positive where the first is better."""
        return -difference if self.is_loss else difference

    def number(self, value: float, sign: str = "") -> str:
        """Formats a value without its unit; `sign` is `+` to show that of a difference."""
        return f"{value:{sign}.{self.digits}f}"

    def text(self, measured: Mapping[str, Any]) -> str:
        """Formats a measurement for a line of output: `accuracy 97.20 %`."""
        return f"{self.label} {self.number(self.value(measured))} {self.unit}".rstrip()

    @property
    def title(self) -> str:
        """For an axis: `accuracy (%)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


ACCURACY = Score("accuracy", "accuracy", "%", 100.0, 2, is_loss=False)
BITS = Score("bits_per_byte", "bits per byte", "", 1.0, 3, is_loss=True)
TOKEN_BITS = BITS._replace(key="bits_per_token", label="bits per token")


def of(measured: Mapping[str, Any], prefix: str = "") -> Score:
    """Returns the score of a run from its measurements: bits wherever there are some."""
    bits = (score for score in (BITS, TOKEN_BITS) if prefix + score.key in measured)
    return next(bits, ACCURACY)
