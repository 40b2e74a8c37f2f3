"""The reader of 60 lines in `examples/`, which knows docs/format.md alone, routes as the library does."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.lookup.mixing import scatter_assignment, top_width
from knnmoe_hf.models.attach import watch_lookups
from tests.memory.helpers import full_memory
from tests.support.models import tiny_model
from tests.support.stats import with_stats

ROOT = Path(__file__).parents[2]
READER = ROOT / "examples" / "read_memory_with_numpy.py"
STATS = dict(
    background_mean=0.1, reference_drift=0.1, background_drift=-0.05, min_warmup=0.4, threshold=0.6, width=0.2
)
STATS |= dict(open_shift=0.05, background_open_shift=0.02, weight=0.5, reference_mean=0.7)


@pytest.fixture(scope="module")
def reader() -> dict:
    return runpy.run_path(str(READER))


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


def test_it_has_at_most_60_lines_and_knows_neither_torch_nor_the_library():
    source = READER.read_text()
    assert len(source.splitlines()) <= 60
    assert "torch" not in source and "import knnmoe_hf" not in source and "from knnmoe_hf" not in source


def as_the_library(model, folder, ids) -> dict[int, tuple]:
    """By layer, the gate's input, its own logits and assignment, and the mixed ones."""
    memory, events, inputs = RoutingMemory.from_pretrained(folder), {}, {}
    hooks = []
    attach_memory(model, memory)
    with watch_lookups(model, lambda event: events.update({event.layer: event})), torch.no_grad():
        for layer in memory.layers:
            gate = model.model.layers[layer].mlp.gate
            hooks.append(gate.register_forward_hook(lambda _, given, out, i=layer: inputs.update({i: given[0]})))
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    detach_memory(model)
    return {
        layer: (
            inputs[layer].reshape(ids.shape[1], -1),
            events[layer].own,
            events[layer].mixed,
            events[layer].confidence,
        )
        for layer in memory.layers
    }


OPTIONS = [
    dict(),
    dict(confidence="context", context_threshold=0.5, context_width=0.2),
    dict(key_codec="pca", key_dim=8, key_dtype="int8", value_dtype="int8", value_experts=2),
    dict(key_codec="pca", key_dim=8, key_whitening=0.0, value_dtype="float16"),
    dict(key_codec="logits", key_dtype="float16", value_dtype="int8"),
    dict(value_space="delta", value_dtype="int8", value_experts=2, key_dtype="int8"),
    dict(value_space="delta", temperature=0.5, gamma=0.1),
    dict(value_space="assignment"),
    dict(value_space="assignment", value_dtype="float16", value_experts=2, key_codec="pca", key_dim=8),
]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_mixes_as_the_library_does(reader, model, tmp_path, options, calibrated):
    chosen = {"confidence": "calibrated"} | {"context_threshold": 0.5, "context_width": 0.2} if calibrated else {}
    memory = full_memory(model, **(options | chosen))
    if calibrated:
        memory = with_stats(memory, gamma=float(memory.config.gamma), **STATS)
    memory.save_pretrained(tmp_path)
    ids = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(5))
    config, layers = reader["read"](tmp_path)
    assert list(layers) == [0, 1]
    before, assigned = (0, 0, 0), memory.config.value_space == "assignment"
    for layer, (x, own, found, lam) in as_the_library(model, tmp_path, ids).items():
        np.testing.assert_allclose(
            reader["values"](layers[layer]), memory.layers[layer].decoded_values.numpy(), rtol=1e-5, atol=1e-6
        )
        dense = scatter_assignment(*own[1:], own[0].shape[-1]) if assigned else own[0]
        mixed, before = reader["mixed"](config, layers[layer], x.numpy(), own[0].numpy(), dense.numpy(), before)
        assert float(lam.max()) > 0.01
        if assigned:
            weights, chosen_experts = top_width(torch.from_numpy(mixed).float(), found[2].shape[-1])
            mixed, wanted = (
                scatter_assignment(weights, chosen_experts, mixed.shape[-1]),
                scatter_assignment(*found[1:], mixed.shape[-1]),
            )
        else:
            wanted = found[0]
        np.testing.assert_allclose(mixed, wanted.numpy(), rtol=2e-3, atol=2e-4)


def test_it_refuses_a_file_that_was_edited(reader, model, tmp_path):
    full_memory(model).save_pretrained(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AssertionError, match="is not what was saved"):
        reader["read"](tmp_path)


def test_it_prints_the_shapes_of_a_memory(model, tmp_path, capsys, monkeypatch):
    full_memory(model).save_pretrained(tmp_path, provenance="none", next_tokens=True)
    monkeypatch.setattr("sys.argv", ["read_memory_with_numpy.py", str(tmp_path)])
    runpy.run_path(str(READER), run_name="__main__")
    assert capsys.readouterr().out == "{0: (40, 8), 1: (40, 8)}\n"
