"""From raw numbers to points: gain, harm and costs of a setting over kinds and seeds; and which are on a front."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from benchmarks.results import scores_of
from benchmarks.settings import COMPETITORS, GRID_KINDS, REFERENCE_COUNTS, SEEDS
from benchmarks.texts import OFF_STEP
from knnmoe_hf.evaluation import Change

Key = tuple[str, str, int]
"""Lab, kind of the references, seed."""
Cells = dict[Key, dict[str, dict]]


@dataclass(frozen=True)
class Point:
    """
    One setting on one lab.

    Attributes:
        name, group: of the setting.
        nll, hits: change in-domain, the mean over the kinds of references.
        off_nll, off_hits: change off-domain, the mean over the kinds of references and of other text.
        worst: change of the NLL on the kind of other text that suffers most.
        worst_text: which that is, `"python after topics"`.
        nbytes, seconds: of what is shipped, and to make it; means.
        cells: how many (kind, seed) it was measured on.
        keeps: whether the model's own weights stay as they are.
    """

    name: str
    group: str
    nll: Change
    hits: Change
    off_nll: Change
    off_hits: Change
    worst: Change
    worst_text: str
    nbytes: float
    seconds: float
    cells: int
    keeps: bool

    @property
    def gain(self) -> float:
        """Nats per token."""
        return -self.nll.mean

    @property
    def harm(self) -> float:
        """Nats per token; negative where it helps off-domain too."""
        return self.off_nll.mean


def points(cells: Cells, frozen: dict[str, dict], lab: str, kinds: Iterable[str], seeds: Iterable[int]) -> list[Point]:
    """A point for each setting of a lab, over those of these cells in which it was measured."""
    kinds, seeds = set(kinds), set(seeds)
    found = defaultdict(dict)
    for (name, kind, seed), entries in cells.items():
        if name == lab and kind in kinds and seed in seeds:
            for setting, entry in entries.items():
                found[setting][kind, seed] = entry
    return [_point(setting, entries, frozen[lab]["frozen"]["scores"]) for setting, entries in found.items()]


def _point(name: str, entries: dict[tuple[str, int], dict], frozen: dict[str, dict]) -> Point:
    own, off = defaultdict(list), defaultdict(list)  # (kind of references, text): a change by window for each seed
    for (kind, _), entry in entries.items():
        for text, stored in entry["scores"].items():
            (own if text == kind else off)[kind, text].append(_difference(frozen[text], stored))
    own, off = ({pair: torch.stack(seeds).mean(0) for pair, seeds in side.items()} for side in (own, off))
    alone = {pair: pooled({pair: change}, 0) for pair, change in off.items()}
    worst = max(alone, key=lambda pair: alone[pair].mean)
    return Point(
        name=name,
        group=next(iter(entries.values()))["group"],
        nll=pooled(own, 0),
        hits=pooled(own, 1),
        off_nll=pooled(off, 0),
        off_hits=pooled(off, 1),
        worst=alone[worst],
        worst_text=f"{worst[1]} after {worst[0]}",
        nbytes=mean(entry["bytes"] for entry in entries.values()),
        seconds=mean(entry["build_seconds"] for entry in entries.values()),
        cells=len(entries),
        keeps=all(entry["keeps"] for entry in entries.values()),
    )


def _difference(base: dict[str, list], changed: dict[str, list]) -> Tensor:
    """(3, windows): the change of the NLL and of the hits, and the number of targets."""
    before, after = scores_of(base), scores_of(changed)
    step = 1 if len(before.nll) == len(after.nll) else OFF_STEP
    return torch.stack([after.nll - before.nll[::step], after.hits - before.hits[::step], after.tokens])


def pooled(changes: dict[tuple[str, str], Tensor], metric: int, resamples: int = 2000, seed: int = 0) -> Change:
    """
    The mean of several texts' changes per token, with its 95 % percentile interval.

    Windows are resampled within each text, and those of one text alike for all kinds of references that were judged
    on it.

    Args:
        changes: by kind of references and text, what `_difference` gives, averaged over seeds.
        metric: its row.
    """
    by_text = defaultdict(list)
    for (_, text), change in changes.items():
        by_text[text].append(change)
    generator, means, total = torch.Generator().manual_seed(seed), 0.0, 0.0
    for alike in by_text.values():
        joint = torch.stack(alike).sum(0)
        difference, tokens = joint[metric], joint[2] / len(alike)
        drawn = torch.randint(len(tokens), (resamples, len(tokens)), generator=generator)
        means = means + difference[drawn].sum(-1) / tokens[drawn].sum(-1)
        total += (difference.sum() / tokens.sum()).item()
    low, high = torch.quantile(means / len(changes), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(total / len(changes), low, high)


def grid_points(cells: Cells, frozen: dict[str, dict], lab: str) -> list[Point]:
    """Points over the cells that the whole grid is measured on; without those that lack one of these."""
    found = points(cells, frozen, lab, GRID_KINDS, SEEDS[:1])
    most = max((point.cells for point in found), default=0)
    return [point for point in found if point.cells == most]


def ranked(found: Sequence[Point]) -> list[Point]:
    """The settings of a memory that are compared with each other: all of the same references."""
    return [point for point in found if point.group not in (COMPETITORS, REFERENCE_COUNTS)]


def front(found: Sequence[Point], cost: str) -> list[Point]:
    """
    The points that no other one beats: none gains as much at less cost, or more at the same.

    Costs are compared as far as they can be told apart: harm to 1e-4, bytes and seconds to two digits.

    Args:
        found: the candidates.
        cost: `"harm"`, `"nbytes"` or `"seconds"`.
    """

    def told(point: Point) -> float:
        return round(point.harm, 4) if cost == "harm" else float(f"{getattr(point, cost):.2g}")

    best, kept = float("-inf"), []
    for point in sorted(found, key=lambda point: (told(point), -point.gain)):
        if point.gain > best:
            best = point.gain
            kept.append(point)
    return kept


def fronts(found: Sequence[Point]) -> dict[str, list[str]]:
    """By setting, the fronts that it is on: among memories, and `"all"` for gain against harm with the competitors."""
    on = defaultdict(list)
    for word, cost in (("harm", "harm"), ("bytes", "nbytes"), ("seconds", "seconds")):
        for point in front(ranked(found), cost):
            on[point.name].append(word)
    for point in front([p for p in found if p.group != REFERENCE_COUNTS], "harm"):
        on[point.name].append("all")
    return on
