"""Elements of SVG, the markers of the plots, and how wide their texts are."""

import unicodedata

from markupsafe import Markup, escape

LETTER = 0.6  # width of a letter of a monospaced font, in its size
KINDS = ("memory", "frozen", "fixed", "trained")
"""Of markers: a routing memory, the frozen model, other methods that keep the weights, and those that train some."""

_SHAPES = {
    "memory": "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z",
    "frozen": "M0,-6L6,0L0,6L-6,0Z",
    "fixed": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "trained": "M0,-5.5L5.8,4.5H-5.8Z",
}
MARKER = 6.0  # from a marker's middle to its edges


def tag(name: str, content: str = "", **attributes: object) -> Markup:
    """
    One element; text and attributes are escaped, `Markup` in them is taken as it is.

    Args:
        name: of the element.
        content: text or `Markup`.
        attributes: `_` in their names stands for `-`, and a last one for nothing (`class_`); numbers are rounded to a
            tenth, and those that are None are left out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    listed = "".join(f' {key}="{escape(_number(value))}"' for key, value in given.items())
    return Markup(f"<{name}{listed}>{escape(content)}</{name}>")


def join(parts: "list[Markup]") -> Markup:
    """Elements one after another."""
    return Markup("".join(map(escape, parts)))


def marker(kind: str, x: float, y: float, title: str = "") -> Markup:
    """A marker of a kind, with a title that is shown when it is pointed at."""
    shape = tag("path", d=_SHAPES[kind])
    inside = join([tag("title", title), shape]) if title else shape
    return tag("g", inside, class_=f"marker {kind}", transform=f"translate({x:.1f},{y:.1f})")


def ring(kind: str, x: float, y: float) -> Markup:
    """A ring around a marker."""
    return tag("circle", cx=float(x), cy=float(y), r=9.0, class_=f"ring {kind}")


def legend_sample(kind: str) -> Markup:
    """A sample beside a line of text: of a marker (`"memory"`), a line (`"line memory"`), an area or a ring."""
    style, _, of = kind.rpartition(" ")
    if style == "area":
        shape = tag("rect", x=1, y=3, width=14, height=10, class_=f"area {of}")
    elif style == "ring":
        shape = tag("circle", cx=8, cy=8, r=6, class_=f"ring {of}")
    else:
        shape = tag("polyline", points="0,8 16,8", class_=f"path {of}") if style else marker(of, 8, 8)
    return tag("svg", shape, viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


def text(content: str, x: float, y: float, size: float, class_: str, anchor: str = "start") -> Markup:
    """A text in the plots' font whose middle is at height y, exactly as wide as `text_width` says."""
    return tag(
        "text",
        content,
        x=x,
        y=y + 0.35 * size,
        font_size=size,
        class_=class_,
        text_anchor=anchor,
        textLength=text_width(content, size) or None,
        lengthAdjust="spacingAndGlyphs",
    )


def text_width(content: str, size: float) -> float:
    """Width of a text in a monospaced font, where East Asian letters fill two places."""
    places = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in content)
    return places * LETTER * size


def shortened(content: str, places: int) -> str:
    """At most so many letters of a text on one line."""
    content = " ".join(content.split())
    return content if len(content) <= places else content[: places - 1] + "…"


def _number(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
