"""A method that changed nothing is told to be broken, in whatever way it came to that, and never as a zero."""

import pytest
import torch

from knnmoe_hf.baselines import METHODS
from knnmoe_hf.comparison.effect import effect_on_prompts, effect_on_responses
from tests.comparison.helpers import compared, write_tasks
from tests.comparison.test_effect import record

NOTHING_LEARNED = {"epochs": 1, "learning_rates": [0.0]}
QUICK = {"builder_steps": 1}
FAR = {"confidence": "rbf", "gamma": 1e18}  # however near a neighbour is, its similarity is 0
WAYS = {
    "no-step": {"method": "constant_bias", **NOTHING_LEARNED},
    "no-bonus": {"method": "dsmoe", "strength": 0.0},
    "the-same-bonus-for-all-experts": {"method": "dsmoe", "num_experts": 1000},
    "no-expert-is-forced": {"method": "steermoe", "share_on": 0.0, "share_off": 0.0},
    "every-token-is-sure": {"method": "laser", "confident": 0.0},
    "its-own-weights": {"method": "c3po_mode_finding", "share": 1.0},
    "no-other-share-is-tried": {"method": "c3po_kernel_regression", "shares": 1},
    "a-descent-of-no-rate": {"method": "c3po_gradient_descent", "rate": 0.0, "last_rate": 0.0, "steps": 1},
    "an-adaptation-of-no-rate": {"method": "rewiring", "rate": 0.0, "steps": 1},
    "gates-as-they-were": {"method": "router_only", **NOTHING_LEARNED},
    "gates-as-they-were-by-RoMA": {"method": "roma", **NOTHING_LEARNED, "lambdas": [1.0]},
    "updates-of-zero": {"method": "lora", **NOTHING_LEARNED},
    "weights-as-they-were": {"method": "full_fine_tuning", **NOTHING_LEARNED},
}
SLOW_WAYS = {
    "a-share-of-0": {"method": "knn_lm", "weight": 0.0, "build": QUICK},
    "keys-that-are-far-from-everything": {"method": "knn_moe", "config": FAR, "build": QUICK},
    "both-far-from-everything": {"method": "knn_moe_both", "config": FAR, "build": QUICK},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def check_all_broken(folder, output, methods: list[dict], **how) -> None:
    results = compared(folder, output, methods, [{"name": "small"}], references=12, **how)
    rows = {row["method"]: row for row in results["results"][1:]}
    assert set(rows) == {one["label"] for one in methods}
    for label, row in rows.items():
        assert (row["status"], row["metrics"], row["changes"]) == ("broken", None, {}), (label, row["reason"])
        assert row["effect"]["items_changed"] == 0 and row["effect"]["items_checked"] == row["items"]


def labelled(ways: dict[str, dict]) -> list[dict]:
    return [one | {"label": label} for label, one in ways.items()]


@pytest.mark.parametrize("kind", ["routing", "answers"])
def test_whatever_changes_nothing_is_broken(folder, tmp_path, kind):
    fine_tuned = ("lora", "full_fine_tuning")
    chosen = {label: one for label, one in WAYS.items() if (one["method"] in fine_tuned) == (kind == "answers")}
    check_all_broken(folder, tmp_path / "run", labelled(chosen), limit=4)


@pytest.mark.slow
def test_memories_that_change_nothing_are_broken(folder, tmp_path):
    check_all_broken(folder, tmp_path / "run", labelled(SLOW_WAYS), limit=4)


def test_examples_that_never_fit_are_no_method(folder, tmp_path):
    methods = [{"method": f"in_context_{kind}", "label": kind} for kind in ("fixed", "retrieved")]
    check_all_broken(folder, tmp_path / "run", methods, window=100)


def test_every_method_has_a_way_to_change_nothing_among_these():
    ways = {one["method"] for one in (WAYS | SLOW_WAYS).values()}
    others = {"frozen", "in_context_fixed", "in_context_retrieved", "c3po_released"}  # the last has no such constant
    assert ways | others == set(METHODS)


def test_rounding_is_no_change_of_a_response():
    items = {"task/0": ["k0", "k1"]}
    frozen = record([-20.0, True], [-0.5, False])
    for after, changed in (((-20.0001, -0.500005), 0), ((-20.0003, -0.5), 1), ((-20.0, -0.50002), 1)):
        effect = effect_on_responses(frozen, record(*([one, False] for one in after)), items, torch.float32)
        assert effect.items_changed == changed
        assert effect_on_responses(frozen, record(*([one, False] for one in after)), items, torch.bfloat16).is_none
    assert effect_on_responses(record(-3.0, "a"), record(-3.0, "a"), items, torch.float32).is_none
    assert not effect_on_responses(record(-3.0, "a"), record(-3.0, "b"), items, torch.float32).is_none
    assert not effect_on_responses(record(-3.0, "a"), record(float("nan"), "a"), items, torch.float32).is_none


def test_a_prompt_has_changed_if_tokens_were_put_before_it():
    items = {"task/0": ["k0", "k1"], "task/1": ["k2", "k3"]}
    effect = effect_on_prompts(record("a", "b", "c", "d", prompt_tokens=[0.0, 0.0, 2.5, 2.5]), items)
    assert (effect.on, effect.items_checked, effect.items_changed) == ("prompts", 2, 1)
