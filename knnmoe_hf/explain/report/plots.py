"""The figures of a page as plots for papers, through matplotlib, which is an extra."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnmoe_hf.files import replacing
from knnmoe_hf.pages.figures import Cloud, Curves, Figure, Heat, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

    from knnmoe_hf.explain.report.page import Report

_COLOURS = {"memory": "#0072b2", "frozen": "#16191d", "fixed": "#00755a", "trained": "#c24d00"}
_MARKERS = {"memory": "o", "frozen": "D", "fixed": "s", "trained": "^"}
_WIDTH, _HEIGHT = 5.5, 3.6  # inches


def need_matplotlib() -> None:
    """
    Raises:
        ModuleNotFoundError: saying what to install, if matplotlib is not there.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plots for papers need matplotlib: pip install 'knnmoe_hf[plots]'.")


def write_plots(report: "Report", folder: Path, format: str) -> list[Path]:
    """
    Draws each figure of a page to a file of its own.

    Args:
        report: of the page.
        folder: of the files, made if it is not there.
        format: `"pdf"`, `"png"` or `"svg"`; equal figures give equal files.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    need_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in report.figures().items():
        path = folder / f"{name}.{format}"
        with replacing(path) as temporary:
            _save(figure, temporary, format)
        made.append(path)
    return made


def _save(figure: Figure, path: Path, format: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure as Plot

    # text stays text in SVG and PDF; ids and dates would differ from run to run
    settings = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "knnmoe_hf", "font.size": 9}
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(format)
    with matplotlib.rc_context(settings):
        plot = Plot(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        _draw(figure, plot, plot.add_subplot())
        plot.savefig(path, format=format, dpi=300, metadata=dated)


def _draw(figure: Figure, plot: "Plot", axes: "Axes") -> None:
    axes.set_title(_plain(figure.title))
    match figure:
        case Curves():
            _curves(figure, axes)
        case Heat():
            _heat(figure, plot, axes)
        case Cloud():
            _cloud(figure, plot, axes)


def _curves(figure: Curves, axes: "Axes") -> None:
    for one in figure.lines:
        _line(one, axes)
    for x in figure.rules[0]:
        axes.axvline(x, color="#888888", linewidth=0.8, linestyle="--")
    for y in figure.rules[1]:
        axes.axhline(y, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xlabel(_plain(figure.x.title))
    axes.set_ylabel(_plain(figure.y.title))
    axes.legend(frameon=False, fontsize=7)


def _line(one: Line, axes: "Axes") -> None:
    xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
    look: dict[str, Any] = {"color": _COLOURS[one.kind], "label": _plain(one.name)}
    match one.style:
        case "area":
            axes.fill_between(xs, ys, alpha=0.3, linewidth=0, **look)
        case "ring":
            axes.plot(xs, ys, marker="o", markersize=11, markerfacecolor="none", linestyle="none", **look)
        case "point":
            axes.plot(xs, ys, marker=_MARKERS[one.kind], linestyle="none", **look)
        case "marks":
            axes.plot(xs, ys, marker=_MARKERS[one.kind], markersize=3.5, linewidth=1.2, **look)
        case _:
            axes.plot(xs, ys, linewidth=1.2, **look)


def _heat(figure: Heat, plot: "Plot", axes: "Axes") -> None:
    columns = max(map(len, figure.values))
    table = [[*row, *[float("nan")] * (columns - len(row))] for row in figure.values]
    extent = max((abs(value) for row in figure.values for value in row), default=0.0) or 1.0
    shown = axes.imshow(table, cmap="PuOr_r", vmin=-extent, vmax=extent, aspect="auto", interpolation="nearest")
    step = max(1, len(table) // 12)
    axes.set_yticks(range(0, len(table), step), [str(name) for name in figure.row_names[::step]])
    axes.set_xlabel(figure.columns)
    axes.set_ylabel(figure.rows)
    plot.colorbar(shown, ax=axes, label=figure.unit)


def _cloud(figure: Cloud, plot: "Plot", axes: "Axes") -> None:
    values = [dot.value for dot in figure.dots]
    extent = max(map(abs, values)) or 1.0
    xs, ys = [dot.x for dot in figure.dots], [dot.y for dot in figure.dots]
    look = dict(cmap="PuOr_r", vmin=-extent, vmax=extent, linewidths=0.3, edgecolors="#888888")
    shown = axes.scatter(xs, ys, c=values, s=12, **look)
    axes.set_xticks([])
    axes.set_yticks([])
    plot.colorbar(shown, ax=axes, label=figure.unit)


def _plain(text: str) -> str:
    """A text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")
