"""Clocks, ratios with intervals, and fits of growth: what the benchmarks of cost share."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_RESAMPLES = 2000


class Ratio(NamedTuple):
    """A median ratio with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`1.021 [1.004, 1.043]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def as_points(self) -> str:
        """`+2.1 [+0.4, +4.3]`, of a share."""
        return f"{100 * self.value:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"

    @property
    def as_overhead(self) -> str:
        """The same, followed by `not distinguishable from none` where the interval covers 1."""
        return f"{self}, not distinguishable from none" if self.low <= 1 <= self.high else str(self)


class Growth(NamedTuple):
    """The fit `y = factor * x ** exponent`, and the share of the variance of log y that it explains."""

    factor: float
    exponent: float
    r2: float

    def __str__(self) -> str:
        """`^0.52 (R2 0.98)`."""
        return f"^{self.exponent:.2f} (R2 {self.r2:.2f})"


def synchronize(device: torch.device) -> None:
    """Waits for all work that was queued on a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, its work on the device included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def repeated(run: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """Seconds of each of at least `least` calls, for about `seconds` in all; one more call warms up."""
    first = timed(run, device)
    times = max(least, min(1000, round(seconds / max(first, 1e-6))))
    return [timed(run, device) for _ in range(times)]


def median(values: Sequence[float]) -> float:
    """Of at least one number."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def spread(values: Sequence[float], digits: int) -> str:
    """`1.02 [0.98, 1.10]`: median, least and largest."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ratio(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """
    Median of `other / base`, timing by timing, with a 95 % percentile interval of a paired bootstrap.

    Args:
        base, other: (rounds, timings) seconds of both, measured in turns. Whole rounds are resampled, since what slows
            a machine down lasts longer than a single timing.
    """
    pairs = torch.tensor(other, dtype=torch.float64) / torch.tensor(base, dtype=torch.float64)  # (rounds, timings)
    return _of_rounds(pairs)


def added(base: Sequence[Sequence[float]], one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """As `ratio`, of `(other - one) / base`: what the other takes more than the one, as a share of the base's time."""
    base, one, other = (torch.tensor(seconds, dtype=torch.float64) for seconds in (base, one, other))
    return _of_rounds((other - one) / base)


def _of_rounds(pairs: Tensor) -> Ratio:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (_RESAMPLES, len(pairs)), generator=generator)
    medians = pairs[drawn].flatten(1).quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(float(pairs.quantile(0.5)), low, high)


def growth(x: Sequence[float], y: Sequence[float]) -> Growth | None:
    """Least squares on logarithms; None for fewer than two different x."""
    if len(set(x)) < 2:
        return None
    log_x, log_y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    centred, spread_y = log_x - log_x.mean(), log_y - log_y.mean()
    exponent = (centred @ spread_y / (centred @ centred)).item()
    residual = spread_y - exponent * centred
    r2 = 1.0 if not bool(spread_y.any()) else 1 - (residual @ residual / (spread_y @ spread_y)).item()
    return Growth(math.exp((log_y.mean() - exponent * log_x.mean()).item()), exponent, r2)


def resident(field: str = "RssAnon") -> int:
    """Bytes of this process by a field of `/proc/self/status`; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
