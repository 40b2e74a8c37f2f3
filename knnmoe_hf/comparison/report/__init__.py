"""
From the results of a comparison to pages for people.

What is said is in `contents` (with `tables`, `plots`, `results`), which makes a document of `knnmoe_hf.pages`.
"""

from pathlib import Path

from knnmoe_hf.files import replacing

RESULTS, PAGE, MARKDOWN = "results.json", "report.html", "report.md"


def write_report(folder: Path) -> None:
    """
    Writes `report.html` and `report.md` beside `results.json`, also of a comparison that is not finished.

    Raises:
        FileNotFoundError: if there is no `results.json`.
        ValueError: if that is no JSON object.
    """
    from knnmoe_hf.comparison.report.contents import document_of
    from knnmoe_hf.comparison.report.results import Results
    from knnmoe_hf.pages.markdown import to_markdown
    from knnmoe_hf.pages.page import to_html

    document = document_of(Results.read(folder / RESULTS))
    for name, text in ((PAGE, to_html(document)), (MARKDOWN, to_markdown(document))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
