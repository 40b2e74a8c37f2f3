"""Every method is described, and the page says which constants are ours."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from knnmoe_hf.baselines import METHODS, make_method
from knnmoe_hf.baselines.base import Method
from knnmoe_hf.baselines.registry import method_class

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def described() -> dict[str, tuple[set[str], set[str]]]:
    """By method, the constants of its source and ours, as the page's table names them."""
    section = PAGE.read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    named = [(row[0].strip("`"), *(set(re.findall(r"`(\w+)`", cell)) for cell in row[4:])) for row in rows[2:]]
    return {name: (given, ours) for name, given, ours in named}


def test_the_page_names_every_method_in_its_order():
    assert list(described()) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_its_constants_are_and_which_are_ours(name):
    kind = method_class(name)
    assert issubclass(kind, Method) and kind.source and kind.__doc__
    for field in fields(kind):
        assert re.fullmatch(r"[A-Z0-9a-z].*\.", field.metadata["help"]), field.name
    given, ours = ({f.name for f in fields(kind) if f.metadata["ours"] == mine} for mine in (False, True))
    assert described()[name] == (given, ours)
    assert kind.acts_on in ("routing", "logits", "prompt", "weights")
    assert make_method(name).fit_passes >= 0 and make_method(name).fit_key


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="method='x' is not known: choose among frozen, knn_moe"):
        make_method("x")
    with pytest.raises(ValueError, match="'rate' is no option of the method dsmoe: choose among percentile"):
        make_method("dsmoe", rate=1)
    with pytest.raises(ValueError, match="'rate' is no option of the method frozen: it has none"):
        make_method("frozen", rate=1)
