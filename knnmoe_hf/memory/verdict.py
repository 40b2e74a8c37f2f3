"""What a build found out about its own memory: whether it helps, at what cost, and what would change that."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.options import CONFIDENCES, OPTION_NAMES
from knnmoe_hf.memory.numbers import check, is_finite
from knnmoe_hf.memory.verdict_text import sentences

LEAST_WINDOWS = 5
"""From fewer windows no interval is computed: a bootstrap knows no other window than these."""
ENOUGH_EXAMPLES, ENOUGH_TOKENS = 64, 64 * 255
"""References with which a gain could be told from chance, where it could not with a quarter of them: see the rows of
16 and of 64 windows of 256 tokens in benchmarks/results/effect.md."""
HELD_OUT_SHARE, MOST_WINDOWS = 8, 256
"""One reference in so many is held out to measure the gain on, and at most so many."""
TOLERABLE, SURELY_TOLERABLE = 0.008, 0.02
"""Nats per token that a memory may cost on text that is not of its domain, and that the interval must rule out."""
OUTCOMES = ("helps", "does nothing", "harms", "too few references")
MEASURED_WITH = tuple(name for name in OPTION_NAMES if not name.startswith(("search_", "hnsw_", "faiss_")))
"""Options that a verdict depends on; an engine only changes how fast neighbours are found."""


@dataclass(frozen=True)
class NllChange:
    """
    By how much a memory changes the NLL of some text, in nats per token; below 0 it helps.

    Attributes:
        mean: over all target tokens.
        low, high: its 95 % interval over windows; None from fewer than five windows.
        windows: how many texts of at most `max_length` tokens were read.
        source: of background text, `"given"` or `"this machine"`; None for references.
    """

    mean: float
    low: float | None
    high: float | None
    windows: int
    source: str | None = None

    def __post_init__(self):
        bounds = [self.low, self.high]
        sound = {
            "mean": is_finite(self.mean),
            "low and high": bounds == [None, None] or all(map(is_finite, bounds)) and self.low <= self.high,
            "windows": type(self.windows) is int and self.windows > 0,
            "source": self.source in (None, "given", "this machine"),
        }
        check(sound, self)

    @property
    def gains(self) -> bool:
        """Whether the NLL falls, beyond what chance explains."""
        return self.high is not None and self.high < 0

    @property
    def harms(self) -> bool:
        """Whether the NLL rises, beyond what chance explains."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class Verdict:
    """
    Whether a memory helps, measured when it was built or calibrated.

    The gain is measured on references that neither the calibration nor the lookups had: they and their neighbours in
    the data set are left out of the memory while they are scored. The cost is measured on background text that the
    calibration did not read.

    Attributes:
        examples, tokens: how many references the memory was built from, and their target tokens.
        repeated: held-out references that were left out because others hold their text.
        gain: the change of the NLL of held-out references; None if there are too few to hold any out, or if others
            hold the text of all of them.
        open_gain: the same with the memory wide open (`confidence="rbf"`); None with `gain`.
        elsewhere: `{kind of background text: change of its NLL}`; kinds of which too little text was there are absent.
        confidence: that was in force, `"rbf"`, `"context"` or `"calibrated"`.
        fallback: why `"calibrated"` fell back to `"context"`; None if it did not.
        settings: the options that the memory was measured with; with other ones the verdict does not hold.

    Raises:
        ValueError: for contents of another form.
    """

    examples: int
    tokens: int
    repeated: int
    gain: NllChange | None
    open_gain: NllChange | None
    elsewhere: Mapping[str, NllChange]
    confidence: str
    fallback: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        pair, kinds = (self.gain, self.open_gain), self.elsewhere
        sound = {
            "examples, tokens and repeated": all(
                type(count) is int and count >= 0 for count in (self.examples, self.tokens, self.repeated)
            ),
            "gain and open_gain": pair == (None, None) or all(isinstance(one, NllChange) for one in pair),
            "elsewhere": isinstance(kinds, Mapping)
            and all(isinstance(kind, str) and _is_of_text(change) for kind, change in kinds.items()),
            "confidence": self.confidence in CONFIDENCES,
            "fallback": self.fallback is None or isinstance(self.fallback, str),
            "settings": isinstance(self.settings, Mapping) and set(self.settings) <= set(MEASURED_WITH),
        }
        check(sound, self)

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> "Verdict":
        """From the plain JSON values that `dataclasses.asdict` makes of one."""
        if set(entry) != {one.name for one in fields(cls)}:
            raise ValueError(f"{shown(sorted(entry))} are not the entries of a Verdict")
        measured = {name: None if entry[name] is None else NllChange(**entry[name]) for name in ("gain", "open_gain")}
        elsewhere = {kind: NllChange(**change) for kind, change in entry["elsewhere"].items()}
        return cls(**dict(entry) | measured | {"elsewhere": elsewhere})

    def holds_for(self, config: Any) -> bool:
        """Whether a memory with this `KNNMoEConfig` does what was measured."""
        return all(getattr(config, name, None) == value for name, value in self.settings.items())

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        if self.gain is None or self.gain.low is None:
            return "too few references"
        if self.gain.gains:
            return "helps"
        if self.gain.harms:
            return "harms"
        return "does nothing" if self.examples >= self.enough else "too few references"

    @property
    def enough(self) -> int:
        """Examples like these with which a gain could be told from chance in this library's own measurements."""
        tokens = max(self.tokens / self.examples, 1.0) if self.examples else 256.0
        return max(ENOUGH_EXAMPLES, math.ceil(ENOUGH_TOKENS / tokens))

    @property
    def windows_needed(self) -> int | None:
        """
        Held-out windows from which a gain of the measured size could be told from chance; None if none was measured.

        An interval narrows with the square root of the number of windows.
        """
        change = self.gain
        if change is None or change.low is None or change.mean >= 0:
            return None
        shrink = min(max(change.high - change.mean, 0.0) / -change.mean, 1e6)
        return max(LEAST_WINDOWS, math.ceil(change.windows * shrink**2))

    @property
    def references_needed(self) -> int | None:
        """How many references like these would do; None if the memory helps or harms, or if no number would do."""
        if self.outcome not in ("too few references", "does nothing"):
            return None
        windows = self.windows_needed
        told = windows is not None and windows <= MOST_WINDOWS
        if self.outcome == "does nothing":
            return self._scaled(windows) if told else None
        by_interval = self._scaled(windows if told else LEAST_WINDOWS) if self.gain is not None else 0
        return max(self.enough, by_interval)

    def _scaled(self, windows: int) -> int:
        """How many references leave so many windows to be measured on, if as many of them are repeated as here."""
        return math.ceil(windows * max(HELD_OUT_SHARE, self.examples / self.gain.windows))

    @property
    def kept(self) -> float | None:
        """The share of the wide open memory's gain that the confidence keeps; None if there is no such gain."""
        if self.open_gain is None or self.open_gain.mean >= 0:
            return None
        return self.gain.mean / self.open_gain.mean

    @property
    def worst(self) -> tuple[str, NllChange] | None:
        """The kind of background text on which the memory costs most, and how much; None if none was measured."""
        # of equals the first by name, whatever order a file has them in
        return max(sorted(self.elsewhere.items()), key=lambda item: item[1].mean, default=None)

    @property
    def tolerable(self) -> bool | None:
        """Whether the cost elsewhere is small; None if that is not known, or not surely so."""
        costs = list(self.elsewhere.values())
        if any(cost.mean > TOLERABLE and cost.harms for cost in costs):
            return False
        sure = all(
            cost.mean <= TOLERABLE and cost.high is not None and cost.high <= SURELY_TOLERABLE for cost in costs
        )
        return True if costs and sure else None

    @property
    def may_be_left_on(self) -> bool:
        """Whether the memory helps on its domain and costs little elsewhere, both beyond what chance explains."""
        return self.outcome == "helps" and self.tolerable is True

    def sentences(self) -> list[str]:
        """For a person: does it help; what does it cost, and may it be left on; what would change it."""
        return sentences(self)

    def metrics(self) -> dict[str, float]:
        """
        The numbers for a log: `verdict_gain` (nats per token by which the NLL of held-out references falls) and so on.

        `verdict_helps` is 1 if the memory helps, -1 if it harms, and 0 if neither can be told; with 0,
        `verdict_too_few` is 1 if there are too few references. Numbers that were not measured are absent.
        """
        metrics = {
            "verdict_helps": {"helps": 1.0, "harms": -1.0}.get(self.outcome, 0.0),
            "verdict_too_few": float(self.outcome == "too few references"),
            "verdict_may_be_left_on": float(self.may_be_left_on),
            "verdict_windows": float(self.gain.windows if self.gain is not None else 0),
            "verdict_repeated": float(self.repeated),
        }
        optional = {"verdict_references_needed": self.references_needed, "verdict_kept": self.kept}
        if self.gain is not None:
            low, high = self.gain.low, self.gain.high
            optional |= {"verdict_gain": -self.gain.mean, "verdict_open_gain": -self.open_gain.mean}
            if low is not None:
                optional |= {"verdict_gain_low": -high, "verdict_gain_high": -low}
        for kind, change in self.elsewhere.items():
            optional |= {f"verdict_cost_{kind}": change.mean}
            optional |= {f"verdict_cost_{kind}_low": change.low, f"verdict_cost_{kind}_high": change.high}
        return metrics | {name: float(value) for name, value in optional.items() if value is not None}


def _is_of_text(change: Any) -> bool:
    return isinstance(change, NllChange) and change.source is not None
