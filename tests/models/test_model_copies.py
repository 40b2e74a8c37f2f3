"""Copied and pickled models have their memory with them."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from knnmoe_hf import active_memory, attach_memory, detach_memory, disable_memory
from knnmoe_hf.models.attach import get_memory, watch_lookups
from knnmoe_hf.models.hooks import RoutingHooks
from tests.conftest import random_memory, tiny_model
from tests.models.test_attach import logits_of, traces


def test_a_copied_model_has_hooks_of_its_own(model, tokens):
    base = logits_of(model, tokens)
    attach_memory(model, random_memory(model))
    changed = logits_of(model, tokens)
    twin = copy.deepcopy(model)
    assert get_memory(twin) is get_memory(model)  # shared, not copied
    assert torch.equal(logits_of(twin, tokens), changed)
    seen = []
    with watch_lookups(model, lambda event: seen.append(event.layer)):
        logits_of(twin, tokens)
        assert seen == []
        logits_of(model, tokens)
    assert seen == [0, 1]
    with disable_memory(twin):
        assert torch.equal(logits_of(twin, tokens), base) and torch.equal(logits_of(model, tokens), changed)
    detach_memory(twin)
    assert torch.equal(logits_of(twin, tokens), base) and torch.equal(logits_of(model, tokens), changed)
    second = copy.deepcopy(model)
    detach_memory(model)
    assert torch.equal(logits_of(model, tokens), base) and torch.equal(logits_of(second, tokens), changed)
    assert traces(twin) == traces(copy.deepcopy(twin)) and active_memory(second) == "default"


def through_torch(model):
    """The model after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("confidence", ["rbf", "context"])
@pytest.mark.parametrize("backend", ["torch", "ivf", "hnsw"])
def test_a_pickled_model_has_its_memory_with_it(family, backend, confidence, tokens):
    model = tiny_model(family)
    base, before = logits_of(model, tokens), traces(model)
    attach_memory(model, random_memory(model, search_backend=backend, confidence=confidence), name="law")
    changed, step = logits_of(model, tokens), logits_of(model, tokens[:1, :1])
    with watch_lookups(model, lambda event: None):  # observers are not pickled
        twins = [pickle.loads(pickle.dumps(model)), through_torch(model)]
    for twin in twins:
        assert active_memory(twin) == "law" and get_memory(twin) is not get_memory(model)
        own, lookup = (RoutingHooks.of(either).named["law"][0] for either in (model, twin))
        assert lookup.rows.key_codes is get_memory(twin).layers[0].key_codes and lookup is not own
        assert torch.equal(logits_of(twin, tokens), changed)
        assert torch.equal(logits_of(twin, tokens[:1, :1]), step)
        with disable_memory(twin):
            assert torch.equal(logits_of(twin, tokens), base)
        assert torch.equal(logits_of(model, tokens), changed)
        detach_memory(twin)
        assert torch.equal(logits_of(twin, tokens), base)
        assert [names for *names, _, _ in traces(twin)] == [names for *names, _, _ in before]
        assert RoutingHooks.of(twin) is None
    assert torch.equal(logits_of(model, tokens), changed)


def test_another_process_can_load_a_pickled_model(tokens, tmp_path):
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model, search_backend="ivf"))
    torch.save((model, tokens, logits_of(model, tokens)), tmp_path / "model")
    code = "import sys, torch; model, tokens, wanted = torch.load(sys.argv[1], weights_only=False);"
    code += "assert torch.equal(model(tokens).logits, wanted)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=True, capture_output=True, text=True)


def test_a_pickled_memory_is_the_same(model, tokens):
    memory = random_memory(model, key_codec="pca", key_dim=10, value_dtype="int8", value_experts=3)
    twin = pickle.loads(pickle.dumps(memory))
    attach_memory(model, memory, name="first")
    changed = logits_of(model, tokens)
    attach_memory(model, twin, name="second")
    assert get_memory(model) is twin and torch.equal(logits_of(model, tokens), changed)
