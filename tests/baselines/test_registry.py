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
    assert kind.acts_on and set(kind.acts_on) <= {"routing", "logits", "prompt", "weights"}
    assert make_method(name).fit_passes >= 0 and make_method(name).fit_key


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "constant_bias",
            dict(learning_rates=0.03),
            "learning_rates=0.03 of ConstantBias is not allowed: use a list, each part a number of at least 0",
        ),
        ("lora", dict(learning_rates=["3e-4"]), r"learning_rates=\['3e-4'\] .* YAML reads 3e-4 as text, and 3.0e-4"),
        ("roma", dict(lambdas=[]), r"lambdas=\[\] of RoMA is not allowed"),
        ("roma", dict(layers=0), "layers=0 of RoMA is not allowed: use a whole number of at least 1 or null"),
        (
            "c3po_gradient_descent",
            dict(steps=0),
            "steps=0 of GradientDescent is not allowed: use a whole number of at least 1",
        ),
        (
            "c3po_gradient_descent",
            dict(rate="1e-2"),
            "rate='1e-2' of GradientDescent is not allowed: use a number of at least 0; YAML",
        ),
        ("c3po_released", dict(layers=True), "layers=True of Released is not allowed"),
        ("rewiring", dict(decisive=1), "decisive=1 of Rewiring is not allowed: use true or false"),
        ("dsmoe", dict(percentile=101.0), "percentile=101.0 is not allowed: use a number from 0 to 100"),
        ("dsmoe", dict(strength=float("nan")), "strength=nan of DSMoE is not allowed"),
        ("knn_moe", dict(config=None), "config=None of KNNMoE is not allowed: use a mapping"),
    ],
)
def test_constants_of_another_kind_are_refused_before_anything_runs(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_method(name, **options)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="method='x' is not known: choose among frozen, knn_moe"):
        make_method("x")
    with pytest.raises(ValueError, match="'rate' is not an option of the method dsmoe: choose among percentile"):
        make_method("dsmoe", rate=1)
    with pytest.raises(ValueError, match="'rate' is not an option of the method frozen: it has none"):
        make_method("frozen", rate=1)


def test_methods_that_learn_nothing_take_no_passes_to_fit():
    passes = {name: make_method(name).fit_passes for name in ("frozen", "laser", "rewiring", "dsmoe", "steermoe")}
    assert passes == {"frozen": 0, "laser": 0, "rewiring": 0, "dsmoe": 1, "steermoe": 1}
