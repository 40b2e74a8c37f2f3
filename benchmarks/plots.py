"""The three pictures of the bench, one panel for each lab; colours that colour-blind readers can tell apart."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.figures import Cells, Point, front, grid_points, points, ranked
from benchmarks.report import LABS, load
from benchmarks.settings import COMPETITORS, COUNTS, DEFAULT, GRID_KINDS, GROUPS, PAPER, REFERENCE_COUNTS, SEEDS
from benchmarks.texts import REFERENCES, WINDOW

_COLOURS = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C8C00",
    "#7F7F7F",
    "#7F7F7F",
)
_MARKERS = ("*", "X", "o", "s", "D", "^", "<", "v", "P")
_GAIN = "gain in-domain, nats per token"
_SETUP = f"means over {' and '.join(GRID_KINDS)}, {REFERENCES * WINDOW // 1000} k reference tokens"
_STYLE = {"svg.hashsalt": "effect", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_METHODS = {DEFAULT.name: ("#000000", "o"), "router-only": ("#0072B2", "s"), "LoRA": ("#D55E00", "^")}
_LINES = dict(zip(GRID_KINDS, ("-", "--")))


def write_plots(results: Path) -> list[Path]:
    """Writes `effect-harm.svg`, `effect-bytes.svg` and `effect-references.svg` into the results' folder."""
    cells, frozen = load(results)
    found = {lab: grid_points(cells, frozen, lab) for lab in frozen}
    with pyplot.rc_context(_STYLE):
        return [
            _scatter(results / "effect-harm.svg", found, "harm", "harm off-domain, nats per token"),
            _scatter(results / "effect-bytes.svg", found, "nbytes", "bytes shipped beside the model"),
            _references(results / "effect-references.svg", cells, frozen),
        ]


def _panels(labs: Sequence[str]) -> tuple:
    figure, axes = pyplot.subplots(1, max(1, len(labs)), figsize=(5.2 * max(1, len(labs)), 5.4), squeeze=False)
    for axis, lab in zip(axes[0], labs):
        axis.set_title(LABS[lab])
    axes[0][0].set_ylabel(_GAIN)
    return figure, axes[0]


def _save(figure, path: Path, title: str, columns: int) -> Path:
    entries = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.045 * -(-len(entries) // columns), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _scatter(path: Path, found: dict[str, list[Point]], cost: str, label: str) -> Path:
    figure, axes = _panels(list(found))
    for axis, all_points in zip(axes, found.values()):
        shown = [point for point in all_points if point.group != REFERENCE_COUNTS]
        for group, colour, marker in zip(GROUPS, _COLOURS, _MARKERS):
            some = [point for point in shown if point.group == group]
            if some:
                place = [getattr(point, cost) for point in some], [point.gain for point in some]
                size = 110 if marker == "*" else 34
                axis.scatter(*place, size, colour, marker, label=group, alpha=0.85, zorder=3, linewidths=0)
        best = front(ranked(shown), cost)
        line = [getattr(point, cost) for point in best], [point.gain for point in best]
        axis.step(*line, where="post", color="#555555", lw=1, label="front of the memories", zorder=2)
        named = {point.name for point in best} | {DEFAULT.name, *(setting.name for setting in PAPER)}
        _name(axis, [point for point in shown if point.name in named or point.group == COMPETITORS], cost)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel(label)
        if cost == "nbytes":
            axis.set_xscale("log")
        else:
            axis.axvline(0, color="black", lw=0.8)
            axis.set_xscale("symlog", linthresh=0.01)
    arrow = "further left and further up is better"
    return _save(figure, path, f"Gain against {label.split(',')[0]} ({_SETUP}); {arrow}", 6)


def _name(axis: Axes, some: list[Point], cost: str) -> None:
    """Writes names beside the panel, each at least a line below the one before it; of equal points, the shortest."""
    low, high = axis.get_ylim()
    line, last = (high - low) / 38, float("inf")
    distinct = {(point.gain, getattr(point, cost)): point for point in sorted(some, key=lambda p: -len(p.name))}
    for point in sorted(distinct.values(), key=lambda point: -point.gain):
        last = min(point.gain, last - line)
        place, text = (getattr(point, cost), point.gain), (1.02, last)
        axis.annotate(
            point.name,
            place,
            text,
            textcoords=axis.get_yaxis_transform(),
            fontsize=6.5,
            va="center",
            arrowprops=dict(arrowstyle="-", color="#BBBBBB", lw=0.5, shrinkA=0, shrinkB=2),
            annotation_clip=False,
        )


def _references(path: Path, cells: Cells, frozen: dict[str, dict]) -> Path:
    figure, axes = _panels(list(frozen))
    for axis, lab in zip(axes, frozen):
        for kind in GRID_KINDS:
            found = {point.name: point for point in points(cells, frozen, lab, [kind], SEEDS[:1])}
            tokens = cells.get((lab, kind, SEEDS[0]), {})
            for method, (colour, marker) in _METHODS.items():
                names = [f"{method}, {count} windows" for count in COUNTS] + [method]
                series = [(tokens[name]["reference_tokens"], found[name]) for name in names if name in found]
                if not series:
                    continue
                at, some = zip(*sorted(series, key=lambda pair: pair[0]))
                label = f"{method}, {kind}"
                axis.plot(at, [p.gain for p in some], _LINES[kind], color=colour, marker=marker, ms=4, label=label)
                axis.fill_between(
                    at, [-p.nll.high for p in some], [-p.nll.low for p in some], color=colour, alpha=0.12
                )
        axis.set_xscale("log")
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("reference tokens")
    return _save(figure, path, "Gain against the number of reference tokens (bands: 95 % intervals)", 3)
