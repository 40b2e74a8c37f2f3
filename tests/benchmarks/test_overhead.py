"""The benchmarks of cost: their figures mean what the tables say, and they run. Nothing is judged by its time."""

import json

import pytest
import torch

from benchmarks import in_model, measuring, overhead, synthetic
from knnmoe_hf import KNNMoEConfig, attach_memory
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search import StoredKeys
from tests.conftest import random_memory, tiny_model


@pytest.fixture
def tiny(tmp_path) -> str:
    """A folder with a configuration of a tiny OLMoE, no weights."""
    tiny_model("olmoe").config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_random_model_has_its_own_numbers_where_they_matter(tiny):
    config = tiny_model("olmoe", num_key_value_heads=4).config
    model = synthetic.random_model(config, torch.device("cpu"), torch.bfloat16)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    first, second = (gate.module.weight for gate in find_gates(model))
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1])
    known = tiny_model("olmoe", num_key_value_heads=4).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, known)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_the_block_goes_on_where_the_last_matrix_ended():
    block, parts = torch.arange(5.0), [torch.empty(3), torch.empty(9)]
    start = 0
    for part in parts:
        start = synthetic._copy_from(block, start, part)
    assert torch.cat(parts).tolist() == [i % 5 for i in range(12)] and start == 2


def test_synthetic_rows_lie_around_their_centres_and_recall_their_logits():
    config, generator = KNNMoEConfig(key_dim=8, value_experts=None, value_dtype="float32"), torch.Generator()
    x, logits = torch.randn(20, 32, generator=generator), torch.randn(20, 6, generator=generator)
    rows = synthetic.synthetic_rows(x, logits, 5000, config, seed=0)
    assert rows.key_codes.shape == (5000, 8) and rows.key_codes.dtype == torch.int8
    centres = rows.encoder.query(x, logits)
    distances, nearest = torch.cdist(rows.decoded_keys, centres).square().min(dim=1)
    expected = synthetic.SPREAD**2 * centres.var(dim=0).sum()
    assert distances.mean().item() == pytest.approx(expected.item(), rel=0.2)
    assert (rows.decoded_values - logits[nearest]).std().item() == pytest.approx(0.3 * logits.std().item(), rel=0.2)


def test_fewer_rows_share_their_tensors_and_are_measured_anew():
    config = KNNMoEConfig(key_dim=8)
    x, logits = torch.randn(20, 32), torch.randn(20, 64)
    rows = synthetic.synthetic_rows(x, logits, 400, config, seed=0)
    fewer = synthetic.first_rows(rows, 100, config)
    assert fewer.key_codes.data_ptr() == rows.key_codes.data_ptr() and len(fewer.key_codes) == len(fewer.values) == 100
    assert torch.equal(fewer.decoded_values, rows.decoded_values[:100])
    assert fewer.scale > 0 and fewer.stats.scale == fewer.scale and fewer.stats.differs(config) is None


def test_both_sides_decode_the_same_tokens_and_only_one_has_the_memory():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    seen, text = [], torch.arange(6).view(3, 2)
    forward = model.forward

    def watched(*args, **kwargs):
        with in_model.timed_lookups(torch.device("cpu")) as spent:
            output = forward(*args, **kwargs)
        seen.append((len(spent) > 0, kwargs["input_ids"].item(), kwargs["past_key_values"].get_seq_length()))
        return output

    model.forward = watched
    rounds = in_model.decoding(model, torch.arange(5)[None], text, rounds=2)
    assert {name: [len(one) for one in found] for name, found in rounds.items()} == {n: [2, 2] for n in in_model.SIDES}
    by_side = {side: [one[1:] for one in seen if one[0] is side] for side in (False, True)}
    assert by_side[True] == by_side[False] == [(token, 6 + token) for token in range(6)]
    assert [one[0] for one in seen[:8]] == [False, True, True, False, True, False, False, True]


def test_a_prompt_is_filled_in_without_and_with_the_memory_and_the_other_way_round():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    seen, forward = [], model.base_model.forward

    def watched(*args, **kwargs):
        with in_model.timed_lookups(torch.device("cpu")) as spent:
            output = forward(*args, **kwargs)
        seen.append((len(spent) > 0, kwargs["input_ids"][0, 0].item()))
        return output

    model.base_model.forward = watched
    rounds = in_model.prefilling(model, torch.arange(6).view(3, 2), rounds=2)
    assert {name: [len(one) for one in found] for name, found in rounds.items()} == {n: [2, 2] for n in in_model.SIDES}
    assert seen == [(side, token) for token in (0, 2, 4) for side in (False, True, True, False)]


def test_recall_counts_rows_that_are_equally_near():
    stored = StoredKeys(torch.tensor([[0.0], [1.0], [-1.0], [5.0]]))
    exact = torch.tensor([[0, 1]])
    for found, share in (([0, 2], 1.0), ([0, 3], 0.5), ([3, 3], 0.0)):
        assert in_model.recall(torch.zeros(1, 1), stored, exact, torch.tensor([found])) == share


def test_a_ratio_is_of_pairs_and_growth_is_a_power():
    found = measuring.ratio([[1.0, 2.0], [3.0, 2.0]], [[2.0, 4.0], [6.0, 4.0]])
    assert found == pytest.approx((2.0, 2.0, 2.0))
    assert measuring.ratio([[1.0], [1.0]], [[1.0], [3.0]])[1:] == pytest.approx((1.0, 3.0))
    assert measuring.growth([1, 10, 100], [2, 20, 200]) == pytest.approx((2.0, 1.0, 1.0))
    assert measuring.growth([4, 4], [1, 2]) is None


def test_the_benchmark_of_overhead_runs(tmp_path, tiny):
    sizes = ["--rows", "50", "100", "--engines", "torch", "hnsw", "--rounds", "2", "--steps", "2", "--length", "16"]
    more = ["--prefill", "8", "--references", "64", "--batches", "1", "16", "--seconds", "0", "--model", tiny]
    overhead.main([*sizes, *more, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert [(s["rows"], s["engine"]) for s in found["settings"]] == [
        (rows, engine) for rows in (50, 100) for engine in ("torch", "hnsw")
    ]
    for setting in found["settings"]:
        assert setting["quality"]["recall"] == [1.0, 1.0] and 0 < setting["quality"]["confidence"] < 1
        assert set(setting["forwards"]) == {"decode", "prefill 8"}
        assert [one["batch"] for one in setting["lookup_alone"]["batches"]] == [1, 16]
    table = (tmp_path / "overhead.md").read_text()
    assert sum(line.startswith("| torch | 100 |") for line in table.splitlines()) == 4
