"""Random models and memories have the properties that make timings on them mean something."""

import pytest
import torch

from benchmarks.speed import synthetic
from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.models.gates import find_gates
from tests.support.models import tiny_model


def test_a_random_model_has_its_own_numbers_where_they_matter():
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
