"""What `evaluate` and `quickstart` found: as a table for people, as JSON for programs."""

import io
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # info needs JSON, and no model
    from knnmoe_hf.evaluation import Comparison, Scores
    from knnmoe_hf.memory import RoutingMemory

IN_DOMAIN, OFF_DOMAIN = "in-domain", "off-domain"
_WIDE = 10_000  # columns; where nobody looks through a window, nothing is wrapped or cut


@dataclass(frozen=True)
class Result:
    """
    One column of the table.

    Attributes:
        name: of the text.
        kind: `IN_DOMAIN`, where the memory should help, or `OFF_DOMAIN`, where it should do nothing.
        comparison: of base and memory on it.
        others: comparisons on the same examples with another `recall`, by its name.
    """

    name: str
    kind: str
    comparison: "Comparison"
    others: "Mapping[str, Comparison]" = field(default_factory=dict)


def width() -> int:
    """How many characters a line of the output may have."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else _WIDE


def table(results: Iterable[Result], memory: "RoutingMemory", width: int = _WIDE) -> str:
    """
    Base against memory in plain text.

    Args:
        results: at least one; all with the same other recalls.
        memory: that was compared.
        width: characters in a line; longer names are wrapped.
    """
    results = list(results)
    shown = Table(box=None, pad_edge=False, header_style="")
    shown.add_column("", no_wrap=True)
    for result in results:
        shown.add_column(Text(result.name), justify="right", overflow="fold")
    for label, cells in _lines(results):
        shown.add_row(label, *map(Text, cells))
    page = io.StringIO()
    Console(file=page, width=width, color_system=None, force_terminal=False).print(shown)
    total = f"memory: {memory.nbytes:,} bytes in {len(memory.layers)} layers; recall {memory.config.recall}"
    return "\n".join([*(line.rstrip() for line in page.getvalue().splitlines()), total])


def _lines(results: list[Result]) -> Iterable[tuple[str, list[str]]]:
    """Each line's label and cells."""
    all_of = [result.comparison for result in results]
    yield "", [result.kind for result in results]
    yield "windows", [str(c.change().windows) for c in all_of]
    yield "windows left out", [f"{c.overlap.left_out}" for c in all_of]
    yield "overlap with references", [_share(c.overlap.share) for c in all_of]
    yield "tokens", [f"{c.base.tokens.sum():.0f}" for c in all_of]
    ways = {"": all_of} | {
        f", recall {name}": [result.others[name] for result in results] for name in results[0].others
    }
    yield "NLL base", [f"{c.base.mean_nll:.4f}" for c in all_of]
    for way, found in ways.items():
        yield f"NLL memory{way}", [f"{c.memory.mean_nll:.4f}" for c in found]
        yield "  change [95 %]", [c.change("nll").text(1, 4) for c in found]
    yield "perplexity base", [f"{c.base.perplexity:.2f}" for c in all_of]
    for way, found in ways.items():
        yield f"perplexity memory{way}", [f"{c.memory.perplexity:.2f}" for c in found]
    yield "accuracy base, %", [f"{100 * c.base.accuracy:.2f}" for c in all_of]
    for way, found in ways.items():
        yield f"accuracy memory{way}, %", [f"{100 * c.memory.accuracy:.2f}" for c in found]
        yield "  change [95 %]", [c.change("hits").text(100, 2) for c in found]
    for layer in all_of[0].confidence:
        yield f"confidence, layer {layer}", [f"{c.confidence[layer]:.3f}" for c in all_of]
    for way, found in ways.items():
        if all(c.recall_confidence is not None for c in found):
            yield f"confidence in next tokens{way}", [f"{c.recall_confidence:.3f}" for c in found]
    yield "time base, s", [f"{c.base_seconds:.2f}" for c in all_of]
    for way, found in ways.items():
        yield f"time memory{way}, s", [f"{c.memory_seconds:.2f}" for c in found]


def _share(share: float | None) -> str:
    return "not checked" if share is None else f"{100 * share:.1f} %"


def as_json(result: Result) -> dict[str, Any]:
    """A result as plain JSON values; what is not a finite number is None."""
    comparison = result.comparison
    nll, hits = comparison.change("nll"), comparison.change("hits")
    found = {
        "dataset": result.name,
        "kind": result.kind,
        "windows": nll.windows,
        "tokens": int(comparison.base.tokens.sum()),
        "base": _scores(comparison.base, comparison.base_seconds),
        "memory": _scores(comparison.memory, comparison.memory_seconds),
        "nll_change": {"mean": nll.mean, "low": nll.low, "high": nll.high},
        "accuracy_change": {"mean": hits.mean, "low": hits.low, "high": hits.high},
        "overlap": asdict(comparison.overlap),
        "confidence": {str(layer): share for layer, share in comparison.confidence.items()},
        "recall_confidence": comparison.recall_confidence,
    }
    return finite(found)


def _scores(scores: "Scores", seconds: float) -> dict[str, float]:
    return {
        "nll": scores.mean_nll,
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "seconds": seconds,
    }


def finite(value: Any) -> Any:
    """JSON values with None in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
