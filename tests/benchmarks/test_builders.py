"""`benchmarks/`: what was tried beside the builders does what it says, and the sweep runs."""

import json

import pytest
import torch

from benchmarks import build_time, sweep_builders
from benchmarks.estimators import MidPointRoute, StraightThroughRoute
from knnmoe_hf.models.gates import find_gates
from tests.conftest import tiny_model

LOGITS = torch.tensor([[3.0, 2.0, 1.5, 1.0, 0.0, -1.0, -2.0, -3.0]]).repeat(500, 1)


def gradient_of(weights: torch.Tensor, ids: torch.Tensor, leaf: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """(n, E), of a loss to which each expert adds what it is worth times its weight."""
    return torch.autograd.grad((weights * worth[ids]).sum(), leaf)[0]


def test_straight_through_runs_the_top_k_and_learns_of_the_candidates(family):
    gate = find_gates(tiny_model(family))[0]
    route = StraightThroughRoute(gate)
    route.width = 4
    leaf = LOGITS[:1].clone().requires_grad_()
    weights, ids = route.experts(leaf)
    own, chosen = gate.rule(leaf, 2)
    assert ids[0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(weights[:, :2], own)
    assert (weights[:, 2:] == 0).all()
    worth = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert gradient_of(weights, ids, leaf, worth)[0].argmax() == 3
    assert gradient_of(own, chosen, leaf, worth).abs().max() == 0


def test_mid_point_draws_among_the_candidates_and_halves_half_of_those_from_outside(family):
    gate = find_gates(tiny_model(family))[0]
    route = MidPointRoute(gate)
    route.width = 4
    leaf = LOGITS.clone().requires_grad_()
    weights, ids = route.experts(leaf)
    assert ids.shape == (500, 2) and ids.max() == 3
    assert 0.2 < (ids > 1).float().mean() < 0.6  # drawn from outside of the top-k
    full = leaf.softmax(-1).gather(1, ids)
    if family != "olmoe":
        full = full / full.sum(-1, keepdim=True)
    share = (weights / full).detach()
    assert torch.allclose(share[ids < 2], torch.ones(()))
    outside = share[ids > 1]
    assert torch.allclose(outside.unique().sort().values[[0, -1]], torch.tensor([0.5, 1.0]))
    assert 0.35 < (outside < 0.75).float().mean() < 0.65
    worth = torch.arange(8.0)
    torch.testing.assert_close(gradient_of(weights, ids, leaf, worth), gradient_of(full, ids, leaf, worth))


def test_mid_point_ends_with_the_models_own_rule(family):
    gate = find_gates(tiny_model(family))[0]
    route = MidPointRoute(gate)
    for found, expected in zip(route.experts(LOGITS), gate.rule(LOGITS, 2)):
        assert torch.equal(found, expected)


def test_the_sweep_keeps_the_rows_of_earlier_runs_and_replaces_its_own(tmp_path):
    row = dict(model="olmoe", kind="topics", seed=0, tokens=512, held_out=2, trial="topk", rows=510, seconds=5.1)
    row |= dict(nll_before=4.0, nll_after=2.0, tokens_worse=0.012, experts_changed=0.5)
    row |= {name: [-0.1, -0.2, 0.0] for name in ("in", "against_first", "off")}
    for record in (row, row | {"seed": 1}, row | {"tokens_worse": 0.034}):
        sweep_builders.save(record, tmp_path)
    known = json.loads((tmp_path / "builders.json").read_text())
    assert [(row["seed"], row["tokens_worse"]) for row in known] == [(1, 0.012), (0, 0.034)]
    table = (tmp_path / "builders.md").read_text()
    assert "## olmoe, topics, seed 1 (512 reference tokens, 2 windows of each text)" in table
    assert "| topk | 4.000 -> 2.000 | 3.4 | 50 | -0.1000 [-0.2000, +0.0000] |" in table and "| 10.00 |" in table


def test_no_trial_holds_what_it_is_judged_on():
    class Words:
        eos_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    texts = sweep_builders.Texts("topics", Words(), tokens=16 * 256, held_out=4)
    held = {tuple(row["input_ids"]) for row in texts.validation}
    drawn = [{tuple(row["input_ids"]) for row in texts.references(seed)} for seed in (0, 1, 0)]
    assert len(held) == 4 and len(texts.off) == 4 and all(len(rows) == 16 for rows in drawn)
    assert drawn[0] == drawn[2] != drawn[1]
    assert not any(rows & held for rows in drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, name, options, rows",
    [
        (sweep_builders, "builders", ["--tokens", "512", "--held-out", "2", "--only", "mid-point"], 3),
        (build_time, "build_time", ["--batches", "1", "--repeats", "1", "--steps", "2", "4"], 6),
    ],
)
def test_the_benchmarks_run(tmp_path, script, name, options, rows):
    threads = torch.get_num_threads()
    try:
        script.main([*options, "--results", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(content["records"] if name == "build_time" else content) == rows
    table = (tmp_path / f"{name}.md").read_text()
    assert sum(line.startswith("| ") for line in table.splitlines()) == rows + 1
