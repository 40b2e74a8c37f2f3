"""From scores by window to points (gain, harm and costs of a setting over kinds and seeds), and their fronts."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.effect.settings import BOTH, COMPETITORS, GRID_KIND, KNN_LM, REFERENCE_COUNTS, SEEDS
from knnmoe_hf.evaluation import Change, Scores
from knnmoe_hf.evaluation.scores import LEAST_WINDOWS

Cells = dict[tuple[str, str, int], dict]
"""The content of each cell's file, by lab, kind of the references and seed."""


def load_cells(folder: Path) -> Cells:
    """All files of `benchmarks.effect.run`."""
    cells = {}
    for path in sorted(folder.glob("*-*-*.json")):
        lab, kind, seed = path.stem.rsplit("-", 2)
        cells[lab, kind, int(seed)] = json.loads(path.read_text())
    return cells


_EMPTY = {"base": {}, "settings": {}}


def entries_of(content: dict) -> dict[str, dict]:
    """By setting, what was measured last, each with the `base` scores of the same text and whether it is `earlier`."""
    found = {}
    for block in (*content.get("earlier", ()), content):
        more = {"base": block["base"], "earlier": block is not content}
        found |= {name: entry | more for name, entry in block["settings"].items()}
    return found


def rounded(scores: Scores) -> dict[str, list]:
    """Scores by window, as they are stored."""
    hits, tokens = ([int(value) for value in table.tolist()] for table in (scores.hits, scores.tokens))
    return {"nll": [round(value, 3) for value in scores.nll.tolist()], "hits": hits, "tokens": tokens}


def scores_of(stored: dict[str, list]) -> Scores:
    """The reverse of `rounded`."""
    return Scores(*(torch.tensor(stored[name], dtype=torch.float64) for name in ("nll", "hits", "tokens")))


@dataclass(frozen=True)
class Point:
    """
    One setting on one lab.

    Attributes:
        name, group: of the setting.
        nll, hits: change in-domain, the mean over the kinds of references.
        off_nll, off_hits: change off-domain, the mean over the kinds of references and of other text.
        worst: change of the NLL on the kind of other text where it is largest.
        worst_text: which that is, `"python after topics"`.
        nbytes, seconds: of what is shipped, and to make it; means over cells.
        cells: number of (kind, seed) that it was measured on.
        keeps: whether the model's own weights stay as they are.
        earlier: whether some of it was measured on earlier text (`benchmarks.effect.run --keep`).
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
    earlier: bool = False

    @property
    def gain(self) -> float:
        """In-domain, in nats per token."""
        return -self.nll.mean

    @property
    def harm(self) -> float:
        """Off-domain, in nats per token; negative where the setting helps there too."""
        return self.off_nll.mean


def points(cells: Cells, lab: str, kinds: Iterable[str], seeds: Iterable[int] | None = None) -> list[Point]:
    """A point for each setting of a lab, over those of these cells in which it was measured."""
    kinds, seeds, found = set(kinds), None if seeds is None else set(seeds), defaultdict(dict)
    for (name, kind, seed), content in cells.items():
        if name == lab and kind in kinds and (seeds is None or seed in seeds):
            for setting, entry in entries_of(content).items():
                found[setting][kind, seed] = entry
    return [_point(setting, entries) for setting, entries in found.items()]


def _point(name: str, entries: dict[tuple[str, int], dict]) -> Point:
    own, off = defaultdict(list), defaultdict(list)  # (kind of references, text): a change by window for each seed
    for (kind, _), entry in entries.items():
        for text, stored in entry["scores"].items():
            (own if text == kind else off)[kind, text].append(change_by_window(entry["base"][text], stored))
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
        earlier=any(entry["earlier"] for entry in entries.values()),
    )


def change_by_window(base: dict[str, list], changed: dict[str, list]) -> Tensor:
    """(3, windows) from stored scores: change of the NLL, change of the hits, number of targets."""
    before, after = scores_of(base), scores_of(changed)
    return torch.stack([after.nll - before.nll, after.hits - before.hits, after.tokens])


def pooled(changes: dict[tuple[str, str], Tensor], metric: int, resamples: int = 2000, seed: int = 0) -> Change:
    """
    The mean of several texts' changes per token, with its 95 % percentile interval by a paired bootstrap.

    Windows are resampled within each text; a text that was judged after several kinds of references is resampled
    alike for all of them.

    Args:
        changes: by kind of references and text, `change_by_window` averaged over seeds.
        metric: row of these, 0 for the NLL and 1 for the hits.
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
    windows = [alike[0].shape[1] for alike in by_text.values()]
    if min(windows) < LEAST_WINDOWS:
        return Change(total / len(changes), None, None, sum(windows))
    low, high = torch.quantile(means / len(changes), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(total / len(changes), low, high, sum(windows))


def compared_kinds(cells: Cells, labs: Iterable[str]) -> list[str]:
    """Kinds of references with which the memory that does both was measured on all of these lab models; else all."""
    kinds, labs = list(dict.fromkeys(key[1] for key in cells)), list(labs)
    settings = {kind: [entries_of(cells.get((lab, kind, SEEDS[0]), _EMPTY)) for lab in labs] for kind in kinds}
    return [kind for kind in kinds if all(BOTH.name in found for found in settings[kind])] or kinds


def measured_everywhere(found: Sequence[Point]) -> dict[str, Point]:
    """By name, the points that were measured on as many cells as any: others could not be compared with them."""
    most = max((point.cells for point in found), default=0)
    return {point.name: point for point in found if point.cells == most}


def grid_points(cells: Cells, lab: str) -> list[Point]:
    """Points over the cell that the whole grid is measured on."""
    return points(cells, lab, [GRID_KIND], SEEDS[:1])


def ranked(found: Sequence[Point]) -> list[Point]:
    """The settings of a memory that can be compared: those of the same references."""
    return [point for point in found if point.group not in (COMPETITORS, KNN_LM, REFERENCE_COUNTS)]


def front(found: Sequence[Point], cost: str) -> list[Point]:
    """
    The points that no other beats: none gains as much at less cost, or more at the same cost.

    Costs are equal if they round to the same value: harm to 1e-4, bytes and seconds to two digits.

    Args:
        found: the candidates.
        cost: `"harm"`, `"nbytes"` or `"seconds"`.
    """

    def rounded_cost(point: Point) -> float:
        return round(point.harm, 4) if cost == "harm" else float(f"{getattr(point, cost):.2g}")

    best, kept = float("-inf"), []
    for point in sorted(found, key=lambda point: (rounded_cost(point), -point.gain)):
        if point.gain > best:
            best = point.gain
            kept.append(point)
    return kept


def fronts(found: Sequence[Point]) -> dict[str, list[str]]:
    """By setting, the fronts that it is on: three among memories, and `"all"`, gain against harm with competitors."""
    on = defaultdict(list)
    for word, cost in (("harm", "harm"), ("bytes", "nbytes"), ("seconds", "seconds")):
        for point in front(ranked(found), cost):
            on[point.name].append(word)
    for point in front([p for p in found if p.group != REFERENCE_COUNTS], "harm"):
        on[point.name].append("all")
    return on
