"""`effect.md`: a table for each question, from the raw numbers."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.competitors import RATES
from benchmarks.figures import Cells, Point, fronts, grid_points, points, ranked
from benchmarks.results import load_cells, scores_of
from benchmarks.settings import GRID_KINDS, GROUPS, MAIN, PAPER, SEEDS, SEEDS_OF, grid
from benchmarks.texts import KINDS
from knnmoe_hf.calibration.background import KINDS as ORDINARY
from knnmoe_hf.evaluation import Change

COMMAND = "python benchmarks/effect.py"
LABS = {"olmoe": "lab OLMoE", "qwen3_moe": "lab Qwen3-MoE", "gpt_oss": "lab GPT-OSS"}


def load(results: Path) -> tuple[Cells, dict[str, dict]]:
    """The measured cells, and by lab what the frozen model made of the same text."""
    cells = load_cells(results / "effect")
    labs = sorted({lab for lab, _, _ in cells}, key=list(LABS).index)
    return cells, {lab: json.loads((results / "effect" / f"{lab}.json").read_text()) for lab in labs}


def write_report(results: Path) -> None:
    """Writes `effect.md` into the results' folder."""
    cells, frozen = load(results)
    found = {lab: grid_points(cells, frozen, lab) for lab in frozen}
    parts = [_head(frozen), _main(cells, frozen), _summary(found), _unneeded(found)]
    parts += [_grid(lab, found[lab]) for lab in frozen]
    parts.append(_by_kind(cells, frozen))
    results.mkdir(parents=True, exist_ok=True)
    (results / "effect.md").write_text("\n\n".join(parts) + "\n")


def _head(frozen: dict[str, dict]) -> str:
    rows = []
    for lab, stored in frozen.items():
        scores = {kind: scores_of(found) for kind, found in stored["frozen"]["scores"].items()}
        told = (f"{scores[kind].mean_nll:.3f}, {100 * scores[kind].accuracy:.1f} %" for kind in KINDS)
        rows.append([LABS[lab], *told])
    used = next((stored["frozen"]["versions"] for stored in frozen.values()), {})
    return "\n\n".join(
        [
            "# What a routing memory gains, what it costs, and what else the same tokens buy",
            f"Written by `{COMMAND}`; the raw numbers are in `effect/`, the settings in `benchmarks/settings.py`, the "
            f"protocol in `benchmarks/cells.py`. Versions: {', '.join(f'{n} {v}' for n, v in used.items())}.",
            "Changes are against the frozen model, on the same windows of 256 tokens: NLL in nats per token (lower "
            "is better), next-token accuracy in points, each with a paired-bootstrap 95 % interval in which whole "
            "windows are resampled and seeds are averaged first. Off-domain is the mean over the kinds of text "
            "that the references are not of (two that the model was trained on, two that it was not), *worst* the one "
            "that suffers most. Every method sees the same 128 windows of reference text, unless the table says "
            "otherwise. Bytes are what is shipped beside the base model (fine-tuned weights in float32), seconds the "
            "CPU time of making it. *Removable* methods leave every weight of the model as it is.",
            f"LoRA (rank 8 on attention and on every expert) and the constant bias have the best of the rates "
            f"{', '.join(map(str, RATES['LoRA']))} and {', '.join(map(str, RATES['constant bias']))} on validation "
            "text, router-only fine-tuning 3e-3 and full fine-tuning 3e-4; AdamW, 3 epochs, 16 windows a step, all.",
            '`confidence="calibrated"` looks at a little ordinary text of this machine: other files of the kinds '
            f"{', '.join(ORDINARY)}. So where it is in force, these kinds are not unseen off-domain text; the row "
            "*calibrated on python alone* says what it does to kinds that it has not seen.",
            "The frozen model, NLL and accuracy by kind of text:",
            markdown(["", *KINDS], rows),
        ]
    )


def _main(cells: Cells, frozen: dict[str, dict]) -> str:
    described = ", ".join(f"{kind} with {len(seeds)} seed{'s' * (len(seeds) > 1)}" for kind, seeds in SEEDS_OF.items())
    header = ["", "in-domain NLL", "accuracy", "off-domain NLL", "accuracy", "worst NLL", "MB", "s", "removable"]
    parts = [f"## The methods side by side\n\nMeans over {described}, as far as measured."]
    for lab in frozen:
        found = {point.name: point for point in points(cells, frozen, lab, SEEDS_OF, range(1000))}
        rows = [_row(found[setting.name]) for setting in MAIN if setting.name in found]
        parts.append(f"{LABS[lab]}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _shown(name: str) -> str:
    return name if name in {setting.name for setting in grid()} else f"{name} †"


def _row(point: Point) -> list[str]:
    return [
        _shown(point.name),
        nats(point.nll),
        percent(point.hits),
        nats(point.off_nll),
        percent(point.off_hits),
        f"{point.worst.mean:+.4f} ({point.worst_text})",
        f"{point.nbytes / 1e6:.3g}",
        f"{point.seconds:.0f}",
        "yes" if point.keeps else "no",
    ]


def _summary(found: dict[str, list[Point]]) -> str:
    header = ["group", "setting", *(f"{LABS[lab]}: in, off" for lab in found), "MB", "on a front of"]
    on = {lab: fronts(all_points) for lab, all_points in found.items()}
    by_name = {lab: {point.name: point for point in all_points} for lab, all_points in found.items()}
    rows = []
    for group, name in _ordered(found):
        there = {lab: known[name] for lab, known in by_name.items() if name in known}
        told = [
            f"{there[lab].nll.mean:+.4f}, {there[lab].harm:+.4f}" if lab in there else "not measured" for lab in found
        ]
        size = next(iter(there.values())).nbytes / 1e6
        where = [f"{LABS[lab].removeprefix('lab ')} ({', '.join(on[lab][name])})" for lab in there if name in on[lab]]
        rows.append([group, _shown(name), *told, f"{size:.3g}", "; ".join(where)])
    return "\n\n".join(
        [
            "## Every setting, over the labs",
            f"Mean change of the NLL in-domain and off-domain on {' and '.join(GRID_KINDS)}, seed {SEEDS[0]}. A "
            "memory is on a lab's front of *harm*, *bytes* or *seconds* if no other memory gains more at as little "
            "off-domain harm, size or build time; on that of *all* if no competitor either gains more at as little "
            "harm. Bytes are those of the first lab. † is no longer in the library; with what options it was measured "
            "is in the raw numbers.",
            markdown(header, rows),
        ]
    )


def _ordered(found: dict[str, list[Point]]) -> list[tuple[str, str]]:
    """(group, name) of every setting, by group, in the order of measurement."""
    known = {point.name: point.group for all_points in found.values() for point in all_points}
    return sorted(((group, name) for name, group in known.items()), key=lambda pair: (*GROUPS, pair[0]).index(pair[0]))


def unneeded(found: dict[str, list[Point]]) -> list[str]:
    """Settings of a memory that are on no lab's front and are not the paper's own."""
    needed = {setting.name for setting in PAPER}
    for all_points in found.values():
        needed |= {name for name, words in fronts(all_points).items() if words}
    every = {point.name: None for all_points in found.values() for point in ranked(all_points)}
    return [name for name in every if name not in needed]


def _unneeded(found: dict[str, list[Point]]) -> str:
    names = unneeded(found)
    return f"On no lab's front, and not the paper's own: {'; '.join(names) if names else 'none'}."


def _grid(lab: str, all_points: list[Point]) -> str:
    on = fronts(all_points)
    order = [name for _, name in _ordered({lab: all_points})]
    header = ["", "in-domain NLL", "accuracy", "off-domain NLL", "accuracy", "worst NLL", "MB", "s", "on the front of"]
    ordered = sorted(all_points, key=lambda point: order.index(point.name))
    rows = [[*_row(point)[:-1], ", ".join(on[point.name])] for point in ordered]
    return f"## {LABS[lab]}, every setting\n\n{markdown(header, rows)}"


def _by_kind(cells: Cells, frozen: dict[str, dict]) -> str:
    kinds = [kind for kind in SEEDS_OF if any(key[1] == kind for key in cells)]
    rows = []
    for lab in frozen:
        found = {kind: {p.name: p for p in points(cells, frozen, lab, [kind], range(1000))} for kind in kinds}
        for setting in MAIN:
            told = []
            for kind in kinds:
                point = found[kind].get(setting.name)
                told.append(f"{nats(point.nll)}, off {point.harm:+.4f}" if point else "not measured")
            rows.append([LABS[lab], setting.name, *told])
    return f"## By kind of reference text\n\nChange of the NLL.\n\n{markdown(['', '', *kinds], rows)}"


def nats(change: Change) -> str:
    """In nats, with the interval."""
    return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def percent(change: Change) -> str:
    """In points, with the interval."""
    return f"{100 * change.mean:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
