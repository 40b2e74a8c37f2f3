"""A trace as one page of HTML: the text, and for each token its layers, their neighbours and experts."""

import base64
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from knnmoe_hf import pages
from knnmoe_hf.explain.packed import pack
from knnmoe_hf.explain.trace import RoutingTrace
from knnmoe_hf.memory.card.base_name import published
from knnmoe_hf.pages.svg import tag
from knnmoe_hf.version import __version__

_TEMPLATES = Path(__file__).with_name("templates")
_SHARED = Path(pages.__file__).with_name("templates")
GENERATOR = f"knnmoe_hf {__version__}"
# what would end the element that the data is in, or begin a comment there
_ESCAPED = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def to_html(trace: RoutingTrace, title: str = "What the memory recalled", tokenizer=None) -> str:
    """
    The text of a page: self-contained, without a network, light and dark, for wide and narrow windows.

    Args:
        trace: a trace whose context has ended.
        title: of the page.
        tokenizer: in place of the one that was saved with the memory; without any, tokens are shown by their ids.
    """
    data = json.dumps(pack(trace, tokenizer), separators=(",", ":"), allow_nan=False).translate(_ESCAPED)
    style = Markup((_SHARED / "style.css").read_text() + (_TEMPLATES / "explain.css").read_text())
    script = Markup((_SHARED / "script.js").read_text() + (_TEMPLATES / "explain.js").read_text())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("explain.html")
        .render(
            title=title,
            lead=lead(trace),
            notes=notes(trace, tokenizer),
            data=Markup(data),
            style=style,
            script=script,
            script_digest=digest,
            has_gain=trace.gain is not None and not bool(trace.gain.isnan().all()),
            layers=list(trace.layers),
            generator=GENERATOR,
            footer=f"Made by {GENERATOR}.",
        )
    )


def in_notebook(trace: RoutingTrace) -> str:
    """The page in a frame, as a notebook shows it."""
    return str(tag("iframe", srcdoc=to_html(trace), width="100%", height="700", style="border: 0", title="Trace"))


def lead(trace: RoutingTrace) -> str:
    """What was traced, and what the memory did to it in the mean, in two sentences."""
    confidences = [one.confidence.nanmean().item() for one in trace.layers.values()]
    base = published(trace.memory).config.base_model_name_or_path  # never a path of the machine
    said = f"{len(trace):,} tokens in {len(trace.layers)} layers, with a memory of {len(trace.memory):,} rows"
    said += f" for {base}. " if base else ". "
    if confidences:
        said += f"Its mean confidence is {sum(confidences) / len(confidences):.2f}"
    if trace.gain is not None and not bool(trace.gain.isnan().all()):
        change = trace.gain.nanmean().item()
        said += f", and it changes the log-probability of a token by {change:+.3f} nats in the mean"
    return said + "."


def notes(trace: RoutingTrace, tokenizer=None) -> list[str]:
    """What is not on the page, and why."""
    found = [trace.provenance()]
    if trace.seen > len(trace):
        found.append(f"The first {len(trace):,} of {trace.seen:,} tokens are shown.")
    if tokenizer is None and trace.memory.tokenizer is None:
        found.append("There is no tokenizer, so that tokens are shown by their ids.")
    if trace.gain is None or bool(trace.gain.isnan().all()):
        found.append("Log-probabilities with the memory and without it are not known.")
    return found


@lru_cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
