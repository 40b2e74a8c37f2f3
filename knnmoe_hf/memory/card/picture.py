"""The picture of a card: what a memory gains on tokens of which it is more or less confident, as an SVG file."""

from collections.abc import Sequence

from markupsafe import Markup

from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.measurements import ConfidenceBin
from knnmoe_hf.pages.axes import Axis, Scale, scale_for, tick_label
from knnmoe_hf.pages.svg import join, marker, tag, text

ALT = "What the memory gains on tokens of rising confidence, on held-out references and on background text"
_WIDTH, _HEIGHT = 640.0, 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 620.0, 62.0, 306.0
_SIZE = 12.0
_SERIES = {"references": ("memory", "held-out references"), "background": ("fixed", "background text")}
_X, _Y = Axis("mean confidence of a token's layers"), Axis("gain, nats per token (above 0 the memory helps)")
_STYLE = """
svg { background: #ffffff; font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }
text { fill: #333333; } .title { fill: #111111; font-weight: bold; }
.grid { stroke: #e3e3e3; } .rule { stroke: #555555; stroke-dasharray: 4 3; }
.path { fill: none; stroke-width: 1.5; } .path.memory { stroke: #1f5fa8; } .path.fixed { stroke: #b5541c; }
.marker path { stroke: #ffffff; } .memory path { fill: #1f5fa8; } .fixed path { fill: #b5541c; }
"""


def picture(memory: MemoryData) -> str | None:
    """The text of the SVG file; None if nothing was measured that it could show."""
    measured = memory.card_data.measured
    if measured is None:
        return None
    series = {name: getattr(measured, name) for name in _SERIES if getattr(measured, name)}
    return f"{_drawn(series)}\n" if series else None


def _drawn(series: dict[str, Sequence[ConfidenceBin]]) -> Markup:
    bins = [one for found in series.values() for one in found]
    across = scale_for([0.0, max(one.confidence for one in bins)], _X, _LEFT, _RIGHT)
    up = scale_for([0.0, *(-one.change for one in bins)], _Y, _BOTTOM, _TOP)
    drawn = [tag("title", ALT), tag("style", Markup(_STYLE)), _ground()]  # Markup: a style is not text to be escaped
    drawn += [text(_Y.title, 12, 16, _SIZE, "title"), *_legend(series), *_grid(across, up)]
    for name, found in series.items():
        kind = _SERIES[name][0]
        spots = [(across.at(one.confidence), up.at(-one.change)) for one in found]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        drawn.append(tag("polyline", points=points, class_=f"path {kind}"))
        drawn += [marker(kind, *spot, _told(one)) for one, spot in zip(found, spots)]
    size = dict(viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", width=_WIDTH, height=_HEIGHT)
    return tag("svg", join(drawn), xmlns="http://www.w3.org/2000/svg", role="img", aria_label=ALT, **size)


def _ground() -> Markup:
    return tag("rect", width=_WIDTH, height=_HEIGHT, fill="#ffffff")


def _legend(series: dict[str, Sequence[ConfidenceBin]]) -> list[Markup]:
    drawn, x = [], 20.0
    for name, found in series.items():
        kind, said = _SERIES[name]
        tokens = sum(one.tokens for one in found)
        drawn += [marker(kind, x, 40), text(label := f"{said} ({tokens:,} tokens)", x + 14, 40, _SIZE, "key")]
        x += 50 + 0.6 * _SIZE * len(label)
    return drawn


def _grid(across: Scale, up: Scale) -> list[Markup]:
    drawn = []
    for number in (tick for tick in across.ticks(8) if 0 <= tick <= 1):
        x = across.at(number)
        drawn += [
            _line(x, _TOP, x, _BOTTOM, "grid"),
            text(tick_label(_X, number), x, _BOTTOM + 16, _SIZE, "tick", "middle"),
        ]
    for number in up.ticks(6):
        y = up.at(number)
        drawn += [_line(_LEFT, y, _RIGHT, y, "grid"), text(tick_label(_Y, number), _LEFT - 8, y, _SIZE, "tick", "end")]
    drawn.append(_line(_LEFT, up.at(0.0), _RIGHT, up.at(0.0), "rule"))
    return [*drawn, text(_X.title, _RIGHT, _BOTTOM + 40, _SIZE, "title", "end")]


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _told(one: ConfidenceBin) -> str:
    return f"{one.tokens:,} tokens of confidence {one.confidence:.3f}: gain {-one.change:+.4f} nats per token"
