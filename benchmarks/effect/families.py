"""The page `families.md`: what the default memory gains and harms on each routing rule.

python -m benchmarks.effect.run --labs deepseek_v3 minimax_m2 --kinds topics --settings "memory, default"
python -m benchmarks.effect.families                                     # from what was measured
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.effect.figures import Cells, load_cells, points, scores_of
from benchmarks.effect.settings import DEFAULT, GRID_KIND
from benchmarks.pages import nats, parser, percent, table
from benchmarks.texts import REFERENCES, WINDOW

RULES = {
    "olmoe": "softmax, top-k",
    "qwen3_moe": "softmax, top-k, renormalised",
    "gpt_oss": "top-k, softmax",
    "deepseek_v2": "softmax, 2 groups of 4 by their best, factor 2",
    "deepseek_v3": "sigmoid, bias for the choice, 2 groups of 4 by their best two, renormalised, factor 2.5",
    "minimax_m2": "sigmoid, bias for the choice (an argument of the gate), renormalised",
    "ernie4_5_moe": "softmax, bias for the choice, renormalised",
}
"""By lab model, how it chooses 4 experts and weighs them."""
_COMMAND = f'python -m benchmarks.effect.run --labs LAB --kinds {GRID_KIND} --settings "{DEFAULT.name}"'
_INTRODUCTION = f"""# What a memory gains on each routing rule

Measured by `{_COMMAND}`, with the names of the first column for `LAB`; written by
`python -m benchmarks.effect.families`. Scores by window and all options are in `effect/`. COMMITS

A memory with the library's defaults of {REFERENCES} windows of {WINDOW} tokens of `{GRID_KIND}`, English that no lab
model was trained on; NLL in nats per token on held-out windows of the same kind, without and with it, its change and
that of the accuracy in points, with 95 % intervals of a paired bootstrap in which whole windows are resampled and
seeds are averaged first. Off-domain is the mean over the four other kinds of text, *worst* the one with the largest
loss. Nothing was tuned on these windows: constants are the defaults, which were chosen on other text of the first
three models."""
_COLUMNS = ("lab model", "rule", "seeds", "NLL", "with the memory", "change", "accuracy", "off-domain", "worst kind")


def write_page(results: Path) -> None:
    """Writes `families.md` into the folder that has the folder `effect/`."""
    every = load_cells(results / "effect").items()
    cells = {key: cell for key, cell in every if key[1] == GRID_KIND and DEFAULT.name in cell["settings"]}
    rows = [_row(cells, lab) for lab in RULES if any(key[0] == lab for key in cells)]
    commits = sorted({cell["settings"][DEFAULT.name]["commit"] for cell in cells.values()})
    page = _INTRODUCTION.replace("COMMITS", f"Commits of the measurements: {', '.join(commits)}.")
    (results / "families.md").write_text(f"{page}\n\n{table(_COLUMNS, rows)}\n")


def _row(cells: Cells, lab: str) -> list[str]:
    own = {key: cell for key, cell in cells.items() if key[0] == lab}
    point = next(one for one in points(own, lab, [GRID_KIND]) if one.name == DEFAULT.name)
    base, with_memory = _nll(cell["base"] for cell in own.values()), _nll(_scores(own))
    found = [f"{base:.3f}", f"{with_memory:.3f}", nats(point.nll), percent(point.hits)]
    worst = f"{nats(point.worst)} ({point.worst_text.partition(' ')[0]})"
    return [f"`{lab}`", RULES[lab], str(len(own)), *found, nats(point.off_nll), worst]


def _scores(cells: Cells) -> list[dict]:
    return [cell["settings"][DEFAULT.name]["scores"] for cell in cells.values()]


def _nll(scores: Iterable[dict]) -> float:
    return mean(scores_of(stored[GRID_KIND]).mean_nll for stored in scores)


if __name__ == "__main__":
    write_page(parser(__doc__).parse_args().results)
