"""A verdict in words: three sentences that are true of whatever was measured, and that a person can act on."""

import math
from typing import TYPE_CHECKING

from knnmoe_hf.errors import counted

if TYPE_CHECKING:
    from knnmoe_hf.memory.verdict import NllChange, Verdict

_OWN_TEXT = "ordinary text of your own (ordinary_dataset, --ordinary-dataset)"
_SOURCES = {"given": "text that was given", "this machine": "text found on its maker's machine"}


def sentences(verdict: "Verdict") -> list[str]:
    """Whether the memory helps and what of its gain the confidence keeps; what it costs; what would change it."""
    return [f"{_gain(verdict)}.", f"{_cost(verdict)}.", f"{_way_out(verdict)}."]


# does it help


def _gain(verdict: "Verdict") -> str:
    outcome, change = verdict.outcome, verdict.gain
    if change is None:
        return f"There are too few references to tell whether the memory helps: {_nothing_held_out(verdict)}"
    read = f"on {counted(change.windows, 'held-out reference')}"
    if verdict.repeated:
        read += f" (not counting {verdict.repeated:,} whose text other references have too)"
    if outcome == "helps":
        begin = f"The memory helps: {read} the NLL falls by {_size(change)}"
    elif outcome == "harms":
        begin = f"The memory harms: {read} the NLL rises by {_size(change)}"
    elif outcome == "does nothing":
        begin = f"The memory does nothing that can be told from chance: {read} the NLL changes by {_signed(change)}"
    else:
        begin = f"There are too few references to tell whether the memory helps: {read} the NLL changes by "
        begin += _signed(change)
    return f"{begin}{_kept(verdict)}"


def _nothing_held_out(verdict: "Verdict") -> str:
    if verdict.repeated:
        return f"other references have the text of all {verdict.repeated:,} that were held out to measure it on"
    have = counted(verdict.examples, "example")
    return f"of {have} none can be held out to measure it on, which takes at least eight"


def _kept(verdict: "Verdict") -> str:
    """How much of the gain the confidence keeps, as the end of a sentence."""
    confidence, wide_open = verdict.confidence, verdict.open_gain
    if confidence == "rbf":
        return "; confidence='rbf' holds nothing of it back"
    if wide_open.mean >= 0:
        return f"; wide open (confidence='rbf') it would be {_number(wide_open.mean)}, so there is no gain to keep"
    would = f"the {-wide_open.mean:.4f} that a wide open memory gains (confidence='rbf')"
    share = verdict.kept
    if share <= 0:
        kept = "nothing"
    elif share >= 0.995:
        kept = "all" if share < 1.005 else "more than all"
    else:
        kept = f"{100 * share:.0f} %"
    return f"; confidence='{confidence}' keeps {kept} of {would}"


# what does it cost, and may it be left on


def _cost(verdict: "Verdict") -> str:
    if verdict.worst is None:
        because = "as there was no background text, or too little of it to measure on"
        return f"What it costs on other text was not measured, {because}: {_advice(verdict)}"
    kind, worst = verdict.worst
    if worst.mean > 0:
        said = f"costs {worst.mean:.4f} nats per token{_bounds(worst, 1)} at worst"
    elif worst.mean < 0:
        said = f"costs nothing: the NLL falls by {-worst.mean:.4f} nats per token{_bounds(worst, -1)} at least"
    else:
        said = f"changes nothing{_bounds(worst, 1)}"
    where = f"{kind}, {counted(worst.windows, 'window')} of {_SOURCES[worst.source]}"
    others = sorted(other for other in verdict.elsewhere if other != kind)
    more = "".join(f"; {other} {_number(verdict.elsewhere[other].mean)}" for other in others[:4])
    more += f"; {counted(len(others) - 4, 'other kind')} no worse" if len(others) > 4 else ""
    return f"On other text it {said} ({where}{more}): {_advice(verdict)}"


def _advice(verdict: "Verdict") -> str:
    """May it be left on?"""
    outcome = verdict.outcome
    if outcome == "harms":
        return "do not leave it on"
    if outcome != "helps":
        return "leave it off, as no gain is shown" if verdict.tolerable is not False else "do not leave it on"
    if verdict.tolerable:
        return "you may leave it on"
    if verdict.tolerable is False:
        return "switch it on for text of its domain only (disable_memory, set_memory), and do not leave it on"
    unsure = "" if verdict.worst is None else ", as that cost is not certain to be small"
    return f"leave it on only where all text is of its domain{unsure}"


# what would change it


def _way_out(verdict: "Verdict") -> str:
    ways = {
        "too few references": _more_references,
        "does nothing": _larger_gain,
        "harms": _no_harm,
        "helps": _even_better,
    }[verdict.outcome](verdict)
    if verdict.fallback is not None:
        ways.append(f"confidence='calibrated' fell back to 'context', as {verdict.fallback}")
    said = "; ".join(ways)
    return said[:1].upper() + said[1:]


def _more_references(verdict: "Verdict") -> list[str]:
    needed = f"{verdict.references_needed:,} references like these{' of different text' if verdict.repeated else ''}"
    now = f"now {verdict.examples:,}, with {verdict.tokens:,} tokens"
    facts = "on this library's own models, 64 windows of 256 tokens were enough and 16 were not"
    return [f"about {needed} would do to tell ({now}); {facts}", *_own_text(verdict)]


def _larger_gain(verdict: "Verdict") -> list[str]:
    needed = verdict.references_needed
    if needed is not None:
        now = f"(now {verdict.examples:,})"
        said = f"if the gain is as large as it looks, about {needed:,} references would show it {now}"
    else:
        said = "more references of the same kind are not likely to change it"
    ways = [f"{said}, and references closer to the text that the model meets may gain more"]
    if verdict.open_gain.gains and verdict.confidence != "rbf":
        ways.append(f"wide open the memory does gain, so the confidence holds it back: try {_OWN_TEXT}")
        return ways
    return [*ways, *_own_text(verdict)]


def _no_harm(verdict: "Verdict") -> list[str]:
    # a harm on text like the references is a matter of the references, which no confidence repairs
    examples = max(4 * verdict.examples, verdict.enough)
    ways = [
        f"detach it and build anew, from more references (about {examples:,}, now {verdict.examples:,}) that are like "
        "one another and like the text that the model meets"
    ]
    return ways + (["a confidence other than 'rbf' opens the memory less"] if verdict.confidence == "rbf" else [])


def _even_better(verdict: "Verdict") -> list[str]:
    ways = [
        f"more references gain more (now {verdict.examples:,}): on this library's own models, four times as many "
        "gained about half as much again"
    ]
    if verdict.tolerable is False:
        return [*_less_cost(verdict), *ways]
    if verdict.kept is not None and verdict.kept < 0.5:
        return [f"the confidence holds most of the gain back: {_OWN_TEXT} may change that", *ways]
    return [*ways, *_own_text(verdict)]


def _less_cost(verdict: "Verdict") -> list[str]:
    if verdict.confidence == "rbf":
        return ["confidence='calibrated' bounds the cost elsewhere"]
    kind = verdict.worst[0]
    return [f"{_OWN_TEXT}, also more of the kind {kind}, makes confidence='calibrated' bound the cost there"]


def _own_text(verdict: "Verdict") -> list[str]:
    """What own background text would tell."""
    if verdict.worst is None:
        return [f"32 rows or more of {_OWN_TEXT} would show what it costs there"]
    if any(change.source == "this machine" for change in verdict.elsewhere.values()):
        return [f"{_OWN_TEXT} would show what it costs there (what was read is about software)"]
    if verdict.tolerable is None:
        return [f"more of {_OWN_TEXT} would make the cost certain"]
    return []


# numbers


def _size(change: "NllChange") -> str:
    """A change without its sign, which the words around it give, and what it is in perplexity."""
    sign = -1 if change.mean < 0 else 1
    percent = 100 * abs(math.expm1(min(change.mean, 99)))
    way = "lower" if change.mean < 0 else "higher"
    return f"{abs(change.mean):.4f} nats per token{_bounds(change, sign)}, which is {percent:.1f} % {way} perplexity"


def _signed(change: "NllChange") -> str:
    bounds = _bounds(change, 1)
    if change.low is None:
        bounds = " [n/a, as an interval needs five of them]"
    return f"{_number(change.mean)} nats per token{bounds}"


def _bounds(change: "NllChange", sign: int) -> str:
    if change.low is None:
        return " [n/a]"
    low, high = sorted((sign * change.low, sign * change.high))
    return f" [95 %: {low:.4f} to {high:.4f}]" if low >= 0 else f" [95 %: {_number(low)} to {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:+.4f}"
