"""Base and memories take turns on the same tokens; lookups are timed in the model; the benchmark runs."""

import json

import torch

from benchmarks.speed import in_model, overhead
from knnmoe_hf import attach_memory, watch_lookups
from knnmoe_hf.search import StoredKeys
from tests.support.models import random_memory, tiny_model

SIDES = ["base", "one", "two"]


def model_with_two_memories():
    model = tiny_model("olmoe")
    for seed, name in enumerate(SIDES[1:]):
        attach_memory(model, random_memory(model, seed=seed), name)
    return model


def record_forwards(model) -> list[tuple]:
    """A list that gets the side, the tokens and the length of the cache of every forward of the decoder."""
    seen, forward = [], model.base_model.forward
    running = {"side": None}

    def recorded(*args, **kwargs):
        cache = kwargs.get("past_key_values")
        seen.append((running["side"], kwargs["input_ids"].flatten().tolist(), cache and cache.get_seq_length()))
        return forward(*args, **kwargs)

    model.base_model.forward = recorded
    return seen, running


def test_all_sides_decode_the_same_tokens_in_turns(monkeypatch):
    model, text = model_with_two_memories(), torch.arange(6).view(3, 2)
    seen, running = record_forwards(model)
    enter = in_model.running

    def noted(model, side):
        running["side"] = side
        return enter(model, side)

    monkeypatch.setattr(in_model, "running", noted)
    rounds = in_model.decoding(model, SIDES, torch.arange(5)[None], text, rounds=2)
    assert {side: [len(one) for one in found] for side, found in rounds.items()} == {side: [2, 2] for side in SIDES}
    steps = seen[len(SIDES) :]  # after the prompts
    for side in SIDES:
        assert [one[1:] for one in steps if one[0] == side] == [([token], 5 + token) for token in range(6)]
    orders = [[one[0] for one in steps[at : at + 3]] for at in range(0, len(steps), 3)]
    assert orders[0] != orders[1] and all(order in (SIDES, SIDES[::-1]) for order in orders)


def test_prefill_goes_through_the_sides_and_back(monkeypatch):
    model = model_with_two_memories()
    seen, _ = record_forwards(model)
    rounds = in_model.prefilling(model, SIDES, torch.arange(6).view(3, 2), rounds=2)
    assert {side: [len(one) for one in found] for side, found in rounds.items()} == {side: [2, 2] for side in SIDES}
    assert [one[1] for one in seen] == [[2 * turn, 2 * turn + 1] for turn in range(3) for _ in range(6)]


def test_a_side_runs_its_own_memory_or_none():
    model, ids = model_with_two_memories(), torch.arange(8)[None]
    logits = {}
    for side in SIDES:
        with in_model.running(model, side), torch.no_grad():
            logits[side] = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(logits["base"], tiny_model("olmoe")(input_ids=ids).logits)
    assert not torch.equal(logits["one"], logits["base"]) and not torch.equal(logits["one"], logits["two"])


def test_timed_lookups_change_nothing_and_count_every_lookup_and_step():
    model, ids = model_with_two_memories(), torch.arange(8)[None]
    with torch.no_grad(), in_model.running(model, "one"):
        plain = model(input_ids=ids).logits
        with in_model.timed_lookups(model, "one") as take:
            timed = model(input_ids=ids).logits
            assert {name: len(seconds) for name, seconds in take().items()} == dict.fromkeys(
                ("whole", *in_model.STEPS), 2
            )
            assert not any(take().values())
    assert torch.equal(plain, timed)
    found = in_model.lookups_in_turns(model, SIDES[1:], ids, torch.arange(9).view(3, 3), rounds=2)
    assert {name: len(rounds) for name, rounds in found.items()} == {"one": 2, "two": 2}
    for one in (*found["one"], *found["two"]):
        assert set(one) == {"decode", "prefill"} and set(one["decode"]) == {"whole", *in_model.STEPS}
    in_model.set_memory(model, "one")
    with watch_lookups(model, lambda event: None):  # the memory itself is as before
        model(input_ids=ids)


def test_recall_counts_rows_that_are_equally_near():
    stored = StoredKeys(torch.tensor([[0.0], [1.0], [-1.0], [5.0]]))
    exact = torch.tensor([[0, 1]])
    for found, share in (([0, 2], 1.0), ([0, 3], 0.5), ([3, 3], 0.0)):
        assert in_model.recall(torch.zeros(1, 1), stored, exact, torch.tensor([found])) == share


def test_the_benchmark_runs(tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path / "tiny")
    sizes = ["--rows", "50", "100", "--engines", "torch", "--rounds", "2", "--steps", "2", "--length", "16"]
    more = ["--prefill", "8", "16", "--references", "64", "--model", str(tmp_path / "tiny")]
    overhead.main([*sizes, *more, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert list(found["memories"]) == ["50 rows, torch", "100 rows, torch"]
    for memory in found["memories"].values():
        assert memory["quality"]["recall"] == [1.0, 1.0] and 0 < memory["quality"]["confidence"] < 1
        assert set(memory["forwards"]) == {"decode", "prefill 8", "prefill 16"}
    page = (tmp_path / "overhead.md").read_text()
    assert sum("100 rows, torch |" in line for line in page.splitlines()) == 3 + 1 + 2
    assert found["made"]["command"] in page and "float32" in page


def test_recalls_are_timed_with_the_output_head_beside_routing_alone(tmp_path):
    tiny_model("olmoe").config.save_pretrained(tmp_path / "tiny")
    sizes = [
        "--rows",
        "90",
        "--engines",
        "torch",
        "--rounds",
        "2",
        "--steps",
        "2",
        "--length",
        "16",
        "--prefill",
        "16",
    ]
    more = ["--references", "64", "--model", str(tmp_path / "tiny"), "--recalls", "routing", "next_tokens", "both"]
    overhead.main([*sizes, *more, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "overhead-recalls.json").read_text())["memories"]
    assert list(found) == [f"90 rows, torch, {recall}" for recall in ("routing", "next_tokens", "both")]
    kinds = {"decode", "prefill 16, all logits", "prefill 16, last logits"}
    assert all(set(memory["forwards"]) == kinds for memory in found.values())
    assert [set(memory.get("added", ())) for memory in found.values()] == [set(), kinds, kinds]
    assert all(memory["quality"]["recall"][-1] == 1.0 for memory in found.values())
    page = (tmp_path / "overhead-recalls.md").read_text()
    assert "## Next tokens beside routing alone" in page and "is in every timing" in page


def test_a_forward_with_the_head_returns_the_logits_that_are_kept():
    model, ids = tiny_model("olmoe"), torch.arange(8)[None]
    with torch.no_grad():
        assert not hasattr(in_model.forward_of(model, None)(input_ids=ids), "logits")
        assert [in_model.forward_of(model, keep)(input_ids=ids).logits.shape[1] for keep in (0, 1, 3)] == [8, 1, 3]
