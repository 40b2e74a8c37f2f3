"""
Writes the table of docs/support.md from the cells:

    python -m tests.support.table.page
"""

from pathlib import Path

from knnmoe_hf.models.gates import find_gates
from tests.support.families import FAMILIES, family_model
from tests.support.table.cells import CELLS, REASONS
from tests.support.table.ways import IN_PROCESSES, WAYS

PAGE = Path(__file__).parents[3] / "docs" / "support.md"
START, END = "<!-- the table: written by python -m tests.support.table.page -->", "<!-- end of the table -->"


def table() -> str:
    """The table in Markdown, with a numbered list of reasons."""
    reasons = list(dict.fromkeys(text for text, _, _ in REASONS))
    ways = [*WAYS, *IN_PROCESSES]
    lines = ["| family | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for family in FAMILIES:
        cells = [shown_state(family, way, reasons) for way in ways]
        lines.append(f"| {shown_name(family)} | " + " | ".join(cells) + " |")
    listed = [f"{number}. {reason}." for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *listed])


def shown_state(family: str, way: str, reasons: list[str]) -> str:
    reason = CELLS[family, way]
    return "yes" if reason is None else f"no ({reasons.index(reason) + 1})"


def shown_name(family: str) -> str:
    name = find_gates(family_model(family))[0].family.name
    return f"{name}, `group_limited_greedy`" if family.endswith("_groups") else name


def page_with(text: str, new: str) -> str:
    """The page's text with another table."""
    before, rest = text.split(START)
    return f"{before}{START}\n\n{new}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(), table()))
