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
    made = make_method(name, **{f.name: getattr(make_method(name), f.name) for f in fields(kind)})
    assert made.fit_passes >= 0 and made.fit_key == make_method(name).fit_key


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="method='x' is not known: choose among frozen, knn_moe"):
        make_method("x")
    with pytest.raises(ValueError, match="'rate' is no option of the method dsmoe: choose among percentile"):
        make_method("dsmoe", rate=1)
    with pytest.raises(ValueError, match="'rate' is no option of the method frozen: it has none"):
        make_method("frozen", rate=1)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("constant_bias", {"epochs": "x"}, "epochs='x' is not allowed for the method constant_bias: use an integer."),
        ("constant_bias", {"epochs": None}, "epochs=None"),
        ("constant_bias", {"epochs": True}, "epochs=True"),
        ("constant_bias", {"learning_rates": ["1e-2"]}, "use a list, each a number such as 0.01"),
        ("constant_bias", {"learning_rates": 0.1}, "use a list"),
        ("roma", {"layers": "all"}, "use an integer or null"),
        ("knn_moe", {"config": []}, "use a mapping"),
        ("dsmoe", {"strength": "1e-1"}, "use a number such as 0.01"),
    ],
)
def test_values_of_another_type_are_refused(name, options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        make_method(name, **options)
    assert "\n" not in str(error.value)


def test_values_of_the_right_type_are_taken():
    assert make_method("dsmoe", strength=1).strength == 1
    assert make_method("roma", layers=None, lambdas=(1, 0.5)).layers is None
    assert make_method("knn_lm", weight=None).weight is None
