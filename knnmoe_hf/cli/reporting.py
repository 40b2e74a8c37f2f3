"""Writing the page on a memory, for the commands that end with one."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from knnmoe_hf.cli.comparing import Text
from knnmoe_hf.cli.data import public_name
from knnmoe_hf.cli.tables import IN_DOMAIN, Result
from knnmoe_hf.explain.report.page import Report, document_of
from knnmoe_hf.explain.report.use import TextUse, recorded_use
from knnmoe_hf.files import replacing
from knnmoe_hf.pages.page import to_html


def write_page(report: Report, output: str) -> str:
    """Writes the page; returns the sentence that says where it is."""
    page = to_html(document_of(report))
    with replacing(Path(output)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return f"The page on {report.name} is {output}: open it in a browser."


def uses_of(
    model: nn.Module, texts: Sequence[Text], results: Sequence[Result], batch_size: int, most: int
) -> list[TextUse]:
    """
    What the memory in force does on texts that were compared, for the page.

    Args:
        model, texts: as of `compare_all`.
        results: that it returned.
        batch_size: examples per forward pass.
        most: examples of each text of which the routing is looked at.
    """
    found = []
    for text, result in zip(texts, results, strict=True):
        some = [text.rows[i] for i in range(min(most, len(text.rows)))]
        layers = recorded_use(model, some, batch_size)
        found.append(TextUse(public_name(text.name)[0] or "a text", text.kind == IN_DOMAIN, layers, result.comparison))
    return found
