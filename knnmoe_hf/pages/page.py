"""A report as one page of HTML: self-contained, light and dark, for wide and narrow windows, without a network."""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from knnmoe_hf.pages.document import Charts, Document, Folded, Points, Table, Text
from knnmoe_hf.pages.svg import legend_sample
from knnmoe_hf.version import __version__

_TEMPLATES = Path(__file__).with_name("templates")
_TYPES = {Text: "text", Points: "points", Table: "table", Charts: "charts", Folded: "folded"}


def to_html(document: Document) -> str:
    """
    The text of a page.

    All text of the document is escaped; only what is `Markup` in it, its plots, is taken as it is. The page tells
    browsers to load nothing, and to run no script but its own.
    """
    style, script = (Markup((_TEMPLATES / name).read_text()) for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template("page.html")
    parts = dict(style=style, script=script, script_digest=digest, generator=f"knnmoe_hf {__version__}")
    return page.render(document=document, **parts)


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["type_of"] = lambda part: _TYPES[type(part)]
    environment.globals["legend_sample"] = legend_sample
    return environment


def _breakable(text: str) -> Markup:
    """A name in which a line may break after each underscore."""
    return escape(text).replace("_", Markup("_<wbr>"))
