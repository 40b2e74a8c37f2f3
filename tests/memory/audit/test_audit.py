"""The audit finds hostile rows of many kinds, names their examples, and says nothing of honest memories."""

import functools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents
from knnmoe_hf.memory.audit import audit
from tests.memory.audit.poison import KINDS, MANY, poisoned, with_keys, with_values
from tests.memory.helpers import full_memory
from tests.support.models import gate_inputs, tiny_model
from tests.support.stats import with_stats

LENGTH, EXAMPLES = 64, 18
STORED = {"raw": dict(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None), "default": {}}


@functools.cache
def honest(stored: str, value_experts: int | None = 16) -> RoutingMemory:
    """Keys of real text, and values as a build leaves them: the gate's logits, moved by no more than 3."""
    folder = LAB_MODELS["olmoe"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "\n\n".join(documents("topics", "reference"))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text[:20000])["input_ids"][: LENGTH * EXAMPLES + 1])
    windows, generator = ids[:-1].view(EXAMPLES, LENGTH), torch.Generator().manual_seed(3)
    inputs = [gate_inputs(model, window[None]) for window in windows]
    keys = {layer: torch.cat([of[layer] for of in inputs]).float() for layer in list(inputs[0])[1:3]}
    gates = {layer: model.model.layers[layer].mlp.gate.weight.detach() for layer in keys}
    values = {
        layer: x @ gates[layer].T + 3 * (2 * torch.rand(len(x), len(gates[layer]), generator=generator) - 1)
        for layer, x in keys.items()
    }
    options = {"num_neighbors": 16, "confidence": "context", "value_experts": value_experts} | STORED[stored]
    config = KNNMoEConfig(**options)
    example_ids = torch.arange(EXAMPLES).repeat_interleave(LENGTH)
    return RoutingMemory.from_rows(config, keys, values, model, example_ids, next_tokens=ids[1:])


@pytest.fixture(scope="module", params=["default", pytest.param("raw", marks=pytest.mark.slow)])
def memory(request) -> RoutingMemory:
    return honest(request.param)


def checks(memory: RoutingMemory) -> set[str]:
    return {finding.check for finding in audit(memory).findings}


def test_nothing_is_found_in_an_honest_memory(memory):
    found = audit(memory)
    assert found.findings == [] and found.examples == {} and found.suspicious == 0
    assert list(found.layers) == list(memory.layers) and found.rows == len(memory) == LENGTH * EXAMPLES
    for figures in found.layers.values():
        assert figures.most_attracting < 0.2 and figures.sharpest < 1.7 and figures.largest_residual < 3
        assert figures.measured_scale == pytest.approx(figures.scale, rel=1e-5) and figures.confidence_far_away < 0.1
    assert all(token.lift > 2.5 for token in found.next_tokens) and found.next_tokens


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1], ids=["one row", "1 %", "10 %"])
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows_are_found_and_no_others(memory, kind, share):
    bad, where = poisoned(memory, KINDS[kind], share)
    found = audit(bad)
    rows = torch.stack([finding.rows for finding in found.findings]).any(dim=0)
    assert float(rows[where].float().mean()) > 0.9 and int((rows & ~where).sum()) <= 0.02 * len(memory)
    assert found.suspicious == int(rows.sum())
    assert set(found.examples) == set(memory.provenance.example_ids[rows].tolist())
    assert sum(found.examples.values()) == found.suspicious
    assert all(finding.layer in memory.layers and finding.sentence for finding in found.findings)
    assert all(0 < int(finding.rows.sum()) for finding in found.findings)


@pytest.mark.parametrize("share", [0.0, 0.1], ids=["one row", "10 %"])
@pytest.mark.parametrize("size", [1e4, 1e15, 1e30])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_numbers_of_any_size_are_found(what, size, share):
    memory = honest("raw")
    put = with_keys if what == "keys" else with_values

    def poison(rows, places, generator):
        width = rows.key_codes.shape[1] if what == "keys" else rows.num_experts
        return put(rows, places, size * torch.randn(len(places), width, generator=generator).clamp(-1, 1))

    bad, where = poisoned(memory, poison, share)
    rows = torch.stack([finding.rows for finding in audit(bad).findings]).any(dim=0)
    assert bool(rows[where].all()) and int((rows & ~where).sum()) <= 0.1 * len(memory)


@pytest.mark.parametrize("kind", MANY)
def test_what_is_hardly_seen_in_a_row_is_found_in_many(memory, kind):
    bad, where = poisoned(memory, MANY[kind], 0.1)
    found = audit(bad)
    assert found.findings, kind
    rows = torch.stack([finding.rows for finding in found.findings]).any(dim=0)
    assert float(rows[where].float().mean()) > 0.5 and int((rows & ~where).sum()) <= 0.03 * len(memory)


def test_a_memory_without_the_examples_that_are_named_is_clean(memory):
    kept = memory.provenance.example_ids < 3
    bad, where = poisoned(memory, KINDS["keys at the centre, one expert"], 1.0)
    layers = {
        layer: replace(
            rows,
            key_codes=torch.where(kept[:, None], bad.layers[layer].key_codes, rows.key_codes),
        )
        for layer, rows in memory.layers.items()
    }
    found = audit(replace(memory, layers=layers))
    assert set(found.examples) == {0, 1, 2}
    assert audit(replace(memory, layers=layers).remove_examples(found.examples)).findings == []


def test_values_that_send_all_tokens_to_one_expert_are_found_in_all_rows(memory):
    bad, _ = poisoned(memory, KINDS["one expert, with noise"], 1.0)
    assert {"one_expert", "one_weight"} <= checks(bad)


def test_an_offset_that_lifts_one_expert_in_all_rows_is_found():
    memory = honest("default", None)
    layers = {
        layer: replace(rows, values=replace(rows.values, offset=rows.values.offset + 30.0 * (torch.arange(32) == 7)))
        for layer, rows in memory.layers.items()
    }
    assert {"one_expert", "one_weight"} <= checks(replace(memory, layers=layers))


def test_rows_that_stand_there_many_times_are_found(memory):
    many = torch.arange(len(memory))
    many[-40:] = 7
    layers = {layer: rows.select(many) for layer, rows in memory.layers.items()}
    found = {finding.check: finding for finding in audit(replace(memory, layers=layers)).findings}
    assert int(found["repeated_rows"].rows.sum()) == 41


@pytest.mark.parametrize("share", [0.03, 0.1, 1.0])
def test_a_constant_next_token_is_found(memory, share):
    tokens = memory.next_tokens.clone()
    places = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))[: round(share * len(tokens))]
    tokens[places] = 777
    (finding,) = [f for f in audit(replace(memory, stored_next_tokens=tokens)).findings if f.check == "next_token"]
    assert finding.layer is None and "token 777" in finding.sentence and bool(finding.rows[places].all())


def wide_open(memory: RoutingMemory) -> dict[str, RoutingMemory]:
    """Memories that trust neighbours however far away they are."""
    config = memory.config
    opened = {
        name: type(config).from_dict(config.saved() | given)
        for name, given in {
            "gamma": {"gamma": 0.0},
            "calibrated": {"confidence": "calibrated"},
            "rbf": {"confidence": "rbf"},
            "threshold of context": {"context_threshold": 0.0, "context_width": 100.0, "gamma": 1e-6},
        }.items()
    }
    scaled = {layer: replace(rows, scale=1e6 * rows.scale) for layer, rows in memory.layers.items()}
    calibrated = replace(memory, config=opened["calibrated"])
    return {
        "gamma": replace(memory, config=opened["gamma"]),
        "context": replace(memory, config=opened["threshold of context"]),
        "scale": replace(memory, config=opened["rbf"], layers=scaled),
        "scale of stats": with_stats(calibrated, scale=1e9),
        "means of stats": with_stats(calibrated, scale=1e9, reference_mean=-1.0, background_mean=-2.0, threshold=-5.0),
    }


@pytest.mark.parametrize("how", ["gamma", "context", "scale", "scale of stats", "means of stats"])
def test_a_memory_that_opens_everywhere_is_found(memory, how):
    assert "opens_everywhere" in checks(wide_open(memory)[how])


def test_a_calibration_that_opens_near_the_references_alone_is_fine(memory):
    config = type(memory.config).from_dict(memory.config.saved() | {"confidence": "calibrated"})
    assert checks(with_stats(replace(memory, config=config))) == set()


def test_a_scale_that_is_not_that_of_the_rows_is_found(memory):
    layers = {layer: replace(rows, scale=rows.scale / 10) for layer, rows in memory.layers.items()}
    assert "distance_scale" in checks(replace(memory, layers=layers))


@pytest.mark.parametrize("change", ["shrunk", "one axis for all", "moved"])
def test_an_encoder_that_takes_queries_elsewhere_is_found(change):
    memory = honest("default")

    def hostile(encoder):
        if change == "moved":
            return replace(encoder, bias=encoder.bias + 50)
        weight = encoder.weight * 0.01 if change == "shrunk" else encoder.weight[:1].expand_as(encoder.weight)
        return replace(encoder, weight=weight.contiguous(), bias=-(weight @ encoder.mean))

    layers = {layer: replace(rows, encoder=hostile(rows.encoder)) for layer, rows in memory.layers.items()}
    assert "encoder" in checks(replace(memory, layers=layers))


def test_small_memories_and_those_without_provenance_are_audited():
    model = tiny_model("olmoe")
    memory = full_memory(model)
    assert audit(memory).findings == []
    found = audit(replace(memory, provenance=None))
    assert found.findings == [] and found.examples == {} and found.next_tokens == []
    for count in (0, 1, 2, 19, 20, 21):
        found = audit(memory.take(torch.arange(len(memory)) < count))
        assert found.rows == count and found.findings == [] and list(found.layers) == ([0, 1] if count >= 20 else [])
