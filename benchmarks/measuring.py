"""Clocks, intervals, fits and the hardware's name: what the benchmarks of cost share."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results import versions

_RESAMPLES = 2000


class Ratio(NamedTuple):
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


class Growth(NamedTuple):
    """`y = factor * x ** exponent`, and how much of the spread of log y that explains."""

    factor: float
    exponent: float
    r2: float


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of an accelerator; nothing on a CPU."""
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
    """Seconds of each of at least so many calls, for about so long; one call before them is not counted."""
    first = timed(run, device)
    times = max(least, min(1000, round(seconds / max(first, 1e-6))))
    return [timed(run, device) for _ in range(times)]


def median(values: Sequence[float]) -> float:
    """Of at least one number."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def ratio(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """
    Median of `other / base`, timing by timing, with a paired bootstrap.

    Args:
        base, other: for each round the timings of both, as many in each, taken in turns; rounds are resampled as a
            whole, since what slows a machine down lasts longer than a single timing.
    """
    pairs = torch.tensor(other, dtype=torch.float64) / torch.tensor(base, dtype=torch.float64)  # (rounds, timings)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(base), (_RESAMPLES, len(base)), generator=generator)
    medians = pairs[drawn].flatten(1).quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(float(pairs.quantile(0.5)), low, high)


def growth(x: Sequence[float], y: Sequence[float]) -> Growth | None:
    """Least squares on logarithms; None of fewer than two different x."""
    if len(set(x)) < 2:
        return None
    log_x, log_y = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    centred, spread = log_x - log_x.mean(), log_y - log_y.mean()
    exponent = (centred @ spread / (centred @ centred)).item()
    left = spread - exponent * centred
    r2 = 1.0 if not bool(spread.any()) else 1 - (left @ left / (spread @ spread)).item()
    return Growth(math.exp((log_y.mean() - exponent * log_x.mean()).item()), exponent, r2)


def shown_growth(found: Growth | None) -> str:
    """`^0.52 (R2 0.98)`."""
    return "one point" if found is None else f"^{found.exponent:.2f} (R2 {found.r2:.2f})"


def hardware(device: torch.device) -> dict:
    """What the timings were taken on and with."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions()}
    found["python"] = platform.python_version()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def shown_hardware(found: dict) -> str:
    """In one line."""
    where = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['gpu']}; {where}; {packages}" if "gpu" in found else f"{where}; {packages}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def resident(field: str = "RssAnon") -> int:
    """Bytes of this process by a field of `/proc/self/status`; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def write(folder: Path, name: str, content: dict, text: str) -> None:
    """`<name>.json` and `<name>.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text.rstrip("\n") + "\n")
