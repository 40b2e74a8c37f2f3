"""The pages `effect.md` and `effect.html`, and three pictures, from the files of `benchmarks.effect.run`.

python -m benchmarks.effect.report
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.effect.competitors import RATES
from benchmarks.effect.figures import (
    Cells,
    Point,
    compared_kinds,
    entries_of,
    fronts,
    grid_points,
    load_cells,
    points,
    scores_of,
)
from benchmarks.effect.page import write_page
from benchmarks.effect.pictures import write_pictures
from benchmarks.effect.settings import (
    GRID_KIND,
    GROUPS,
    LABS,
    MAIN,
    METHODS,
    PLAIN,
    SEEDS,
    SEEDS_OF,
    grid,
)
from benchmarks.pages import nats, parser, percent, table
from benchmarks.texts import KINDS, REFERENCES, WINDOW

_INTRODUCTION = f"""# What a routing memory gains, what it costs, and what else the same tokens buy

Measured by `python -m benchmarks.effect.run`, written by `python -m benchmarks.effect.report`. Scores by
window and all options are in `effect/`. COMMITS

Changes are against the frozen model, on the same windows of {WINDOW} tokens: NLL in nats per token (lower is better),
next-token accuracy in points, each with a 95 % interval of a paired bootstrap in which whole windows are resampled and
seeds are averaged first. Off-domain is the mean over the kinds of text that the references are not of (two that the
model was trained on, two that it was not); *worst* is the kind with the largest loss. Every method had the same
{REFERENCES} windows of reference text, unless the table says otherwise. MB is what is shipped beside the base model
(fine-tuned weights in float32), s the CPU time of making it. *Removable* methods leave every weight of the model as it
is.

LoRA (rank 8 on attention and on every expert) and the constant bias have the best of the learning rates
{", ".join(map(str, RATES["LoRA"]))} and {", ".join(map(str, RATES["constant bias"]))} on validation text, router-only
fine-tuning 3e-3, full fine-tuning 3e-4; all with AdamW, 3 epochs, 16 windows a step.

*memory, default* changes the routing alone (`recall="routing"`), *next tokens* the next-token distribution alone,
*both* both, each with what the calibration fitted for it. *both, weight m* has `next_token_weight=m`, the published
mixture with m times the confidence as its weight. *kNN-LM* has no confidence (`confidence="rbf"`, `gamma=0`): one
weight for every token, with this library's keys and neighbours, or with the gate's inputs as they are and 256
neighbours.

`confidence="calibrated"` reads background text of this machine, of the kinds python, headers and notices, from other
files than the test windows. Where it is used, these are not unseen kinds of text; the row *calibrated on python alone*
shows the harm on kinds that it has not read.

Rows marked ‡ were measured, at least in part, where other packages were installed, so that `notices` are other texts;
each is compared with the frozen model on its own texts. † is no longer in the library; its options are in `effect/`.

![Gain in the domain against harm elsewhere](effect-harm.svg)

![Gain against bytes](effect-bytes.svg)

![Gain against the number of reference tokens](effect-references.svg)

References are of KINDS, seed {SEEDS[0]}, in the first picture; of {GRID_KIND}, seed {SEEDS[0]}, in the others. The
lines join settings of one kind: the memory with constant weights (black), routing with `confidence="rbf"` at three
gammas (blue), LoRA at three rates, kNN-LM at several weights.

The frozen model, NLL and accuracy, on the windows that are read of each kind:"""
_COLUMNS = ("", "in-domain NLL", "accuracy", "off-domain NLL", "accuracy", "worst NLL", "MB", "s")


def write_report(results: Path) -> None:
    """Writes `effect.md`, `effect.html` and `effect-{harm,bytes,references}.svg` beside the folder `effect/`."""
    cells = {key: content for key, content in load_cells(results / "effect").items() if key[0] in LABS}
    labs = [lab for lab in LABS if any(key[0] == lab for key in cells)]
    found = {lab: grid_points(cells, lab) for lab in labs}
    parts = [_head(cells, labs), _main(cells, labs), *(_grid(lab, found[lab]) for lab in labs), _by_kind(cells, labs)]
    results.mkdir(parents=True, exist_ok=True)
    (results / "effect.md").write_text("\n\n".join(parts) + "\n")
    write_pictures(results, cells)
    write_page(results, cells)


def _head(cells: Cells, labs: Sequence[str]) -> str:
    rows = []
    for lab in labs:
        base = {}
        for (name, kind, _), content in cells.items():  # all test windows of a kind are read where it is in-domain
            if name == lab:
                base = content["base"] | base | {kind: content["base"][kind]}
        scores = [scores_of(base[kind]) for kind in KINDS]
        rows.append([LABS[lab], *(f"{one.mean_nll:.3f}, {100 * one.accuracy:.1f} %" for one in scores)])
    entries = [entry for content in cells.values() for entry in entries_of(content).values()]
    commits = sorted({entry["commit"] for entry in entries})
    versions = sorted({", ".join(f"{n} {v}" for n, v in entry["versions"].items()) for entry in entries})
    kinds = ", ".join(compared_kinds(cells, labs))
    made = f"Commits of the measurements: {', '.join(commits)}; versions: {'; '.join(versions)}."
    return "\n\n".join([_INTRODUCTION.replace("COMMITS", made).replace("KINDS", kinds), table(["", *KINDS], rows)])


def _main(cells: Cells, labs: Sequence[str]) -> str:
    kinds = compared_kinds(cells, labs)
    text = f"Means over references of {', '.join(kinds)}, seed {SEEDS[0]}; the last table has every kind and seed."
    parts = [f"## The methods side by side\n\n{text}"]
    for lab in labs:
        found = {point.name: point for point in points(cells, lab, kinds, SEEDS[:1])}
        most = max((point.cells for point in found.values()), default=0)
        rows = []
        for point in (found[setting.name] for setting in MAIN if setting.name in found):
            name, *rest = _row(point)
            name += f" ({point.cells} of {most} cells)" * (point.cells < most)
            rows.append([name, *rest, "yes" if point.keeps else "no"])
        parts.append(f"{LABS[lab]}\n\n{table([*_COLUMNS, 'removable'], rows)}")
    return "\n\n".join(parts)


def _row(point: Point) -> list[str]:
    known = point.name in {setting.name for setting in grid()}
    cells = [nats(point.nll), percent(point.hits), nats(point.off_nll), percent(point.off_hits)]
    cells += [f"{point.worst.mean:+.4f} ({point.worst_text})", f"{point.nbytes / 1e6:.3g}", f"{point.seconds:.0f}"]
    return [f"{point.name}{' †' * (not known)}{' ‡' * point.earlier}", *cells]


def _grid(lab: str, found: list[Point]) -> str:
    on, names = fronts(found), [setting.name for setting in grid()]
    found = sorted(
        found, key=lambda p: (GROUPS.index(p.group), names.index(p.name) if p.name in names else len(names))
    )
    rows = [[*_row(point), ", ".join(on[point.name])] for point in found]
    text = (
        f"References are of {GRID_KIND}, seed {SEEDS[0]}. A memory is on the front of *harm*, *bytes* or *seconds* if "
        "no other memory gains more at as little off-domain harm, size or build time; on that of *all* if no "
        "competitor gains more at as little harm either."
    )
    return f"## {LABS[lab]}, every setting\n\n{text}\n\n{table([*_COLUMNS, 'on the front of'], rows)}"


def _by_kind(cells: Cells, labs: Sequence[str]) -> str:
    kinds, rows = [kind for kind in SEEDS_OF if any(key[1] == kind for key in cells)], []
    for lab in labs:
        found = {kind: {point.name: point for point in points(cells, lab, [kind])} for kind in kinds}
        for setting in (*METHODS, *PLAIN):
            here = [found[kind].get(setting.name) for kind in kinds]
            cells_of = [f"{nats(p.nll)}, off {p.harm:+.4f}{' ‡' * p.earlier}" if p else "not measured" for p in here]
            rows.append([LABS[lab], setting.name, *cells_of])
    seeds = ", ".join(f"{kind} with {len(seeds)} seed{'s' * (len(seeds) > 1)}" for kind, seeds in SEEDS_OF.items())
    text = f"Change of the NLL; means over seeds, as far as measured: {seeds}."
    return f"## By kind of reference text\n\n{text}\n\n{table(['', '', *kinds], rows)}"


if __name__ == "__main__":
    write_report(parser(__doc__).parse_args().results)
