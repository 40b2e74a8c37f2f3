"""The axes of a plot: their limits, their ticks, and where on the page a number lies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ROOM = 0.08  # of the span of the numbers, on both sides


@dataclass(frozen=True)
class Axis:
    """
    Attributes:
        title: with the unit.
        is_log: whether equal distances are equal factors.
        shown: from a number to its tick label; None for the number itself.
    """

    title: str
    is_log: bool = False
    shown: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Scale:
    """
    From numbers to places on the page.

    Attributes:
        low, high: the numbers at the two ends.
        start, end: places of these.
        is_log: as in `Axis`.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def at(self, number: float) -> float:
        """The place of a number."""
        low, high, number = (self._linear(value) for value in (self.low, self.high, number))
        return self.start + (self.end - self.start) * (number - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """At most about so many round numbers between the ends."""
        return _log_ticks(self.low, self.high, most) if self.is_log else _linear_ticks(self.low, self.high, most)

    def _linear(self, number: float) -> float:
        return math.log10(number) if self.is_log else number


def scale_for(numbers: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    """
    A scale on which all these numbers have some room around them.

    Args:
        numbers: at least one.
        axis: is drawn with equal distances for equal differences if a number is not positive.
        start, end: places of the ends.
    """
    is_log = axis.is_log and min(numbers) > 0
    values = [math.log10(number) if is_log else number for number in numbers]
    low, high = min(values), max(values)
    room = _ROOM * (high - low) or (0.3 if is_log else abs(high) * _ROOM or 1.0)
    low, high = low - room, high + room
    return Scale(10**low, 10**high, start, end, True) if is_log else Scale(low, high, start, end, False)


def tick_label(axis: Axis, number: float) -> str:
    """What stands beside a tick."""
    return f"{number:g}" if axis.shown is None else axis.shown(number)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most)
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{factor * 10.0**power:.10g}") for power in powers for factor in factors]
        found = [number for number in found if low <= number <= high]
        if len(found) <= most:
            break
    if len(found) < 2:  # both ends lie between two of them
        return _linear_ticks(low, high, most)
    return found[:: max(1, math.ceil(len(found) / most))]
