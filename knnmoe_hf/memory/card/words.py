"""Names and numbers as text of a card, in which no name can pose as markup."""

import math
import re

from knnmoe_hf.errors import counted
from knnmoe_hf.memory.measurements import one_line
from knnmoe_hf.memory.verdict import NllChange

_PLAIN = re.compile(r"[\w./:@+,()=% -]+")


def escaped(text: str) -> str:
    """A text on one line in which Markdown and HTML find no markup: no tag, link, code, table cell or emphasis."""
    text = one_line(text).replace("\\", "\\\\").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[`|*]", r"\\\g<0>", text).replace("](", "]\\(")


def code(text: str) -> str:
    """A name in the letters of code, or escaped if it has letters that code cannot hold."""
    text = one_line(text)
    return f"`{text}`" if _PLAIN.fullmatch(text) and text.strip() == text else escaped(text)


def listed(texts: list[str]) -> str:
    """Several names as code: `a`, `b` and `c`."""
    names = [code(text) for text in texts]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def size(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= power:
            return f"{nbytes / power:.1f} {unit}"
    return counted(nbytes, "byte")


def perplexity(nll: float | None) -> str:
    """Of a mean NLL in nats per token."""
    if nll is None:
        return "n/a"
    value = math.exp(min(nll, 99))
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def change(of: NllChange) -> str:
    """A change of the NLL with its interval, in nats per token."""
    bounds = "n/a" if of.low is None else f"{of.low:+.4f} to {of.high:+.4f}"
    return f"{of.mean:+.4f} [{bounds}]"
