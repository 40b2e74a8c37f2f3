"""Writing the page on a memory, for the commands that end with one."""

from pathlib import Path

from knnmoe_hf.explain.report.page import Report, document_of
from knnmoe_hf.files import replacing
from knnmoe_hf.pages.page import to_html


def write_page(report: Report, output: str) -> str:
    """Writes the page; returns the sentence that says where it is."""
    page = to_html(document_of(report))
    with replacing(Path(output)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return f"The page on {report.name} is {output}: open it in a browser."
