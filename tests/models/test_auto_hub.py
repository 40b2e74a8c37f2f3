"""The drop-in from a Hub: base model and memory in repositories of a server on loopback, by the real client."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from knnmoe_hf import KNNMoEForCausalLM, RoutingMemory, active_memory, detach_memory
from knnmoe_hf.models.attach import get_memory
from tests.memory.helpers import full_memory
from tests.models.test_auto import logits_of, tiny_tokenizer
from tests.support.models import tiny_model


def publish_model(hub, repo: str, folder, seed: int = 0, **access) -> str:
    """A commit with a base model; the repository is made if need be. Returns the commit."""
    if repo not in hub.store.repositories:
        hub.create(repo, **access)
    tiny_model("olmoe", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return hub.commit_folder(repo, folder).oid


def memory_for(repo: str, seed: int = 1, **hub_options) -> RoutingMemory:
    model = AutoModelForCausalLM.from_pretrained(repo, **hub_options)
    return full_memory(model, seed=seed, tokenizer=tiny_tokenizer())


@pytest.fixture
def base(hub, tmp_path) -> str:
    publish_model(hub, "lab/base", tmp_path / "base")
    return "lab/base"


@pytest.fixture
def wanted(base, tokens):
    """The memory, and the logits of the base model with it."""
    memory = memory_for(base)
    assert memory.config.base_model_name_or_path == base
    model = KNNMoEForCausalLM.from_pretrained(base, memory=memory)
    return memory, logits_of(model, tokens)


def test_a_repository_of_a_memory_loads_as_its_base_model_with_the_memory(hub, base, wanted, tokens):
    memory, logits = wanted
    memory.push_to_hub("me/mem")
    assert len(hub.commits("me/mem")) == 2  # the first is the Hub's own
    for model in (
        AutoModelForCausalLM.from_pretrained("me/mem"),
        KNNMoEForCausalLM.from_pretrained("me/mem"),
        KNNMoEForCausalLM.from_pretrained(base, memory="me/mem"),
        AutoModelForCausalLM.from_pretrained("me/mem", revision=hub.commits("me/mem")[0].oid),
    ):
        assert type(model).__name__ == "OlmoeForCausalLM" and active_memory(model) == "default"
        assert torch.equal(logits_of(model, tokens), logits)
    generator = pipeline("text-generation", model="me/mem")
    assert active_memory(generator.model) == "default"
    assert generator("w1 w2 w3", max_new_tokens=3)[0]["generated_text"].startswith("w1 w2 w3")


def test_a_memory_beside_the_model_in_a_subfolder_of_the_models_own_repository(hub, tmp_path, tokens):
    commit = publish_model(hub, "me/model", tmp_path / "base")
    memory = memory_for("me/model")
    assert memory.config.base_model_revision == commit
    logits = logits_of(KNNMoEForCausalLM.from_pretrained("me/model", memory=memory), tokens)
    memory.push_to_hub("me/model", path_in_repo="memories/medicine")
    before = sorted((tmp_path / "base").iterdir())
    assert {path.name for path in before} < set(hub.files("me/model"))  # the model's own files are all there
    plain = AutoModelForCausalLM.from_pretrained("me/model")
    assert active_memory(plain) is None
    place = dict(subfolder="memories/medicine")
    for model in (
        AutoModelForCausalLM.from_pretrained("me/model", **place),
        KNNMoEForCausalLM.from_pretrained("me/model", memory=RoutingMemory.from_pretrained("me/model", **place)),
    ):
        assert torch.equal(logits_of(model, tokens), logits)
        detach_memory(model)
        assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert AutoTokenizer.from_pretrained("me/model", **place)("w1 w2").input_ids == [3, 4]


def test_the_files_of_the_model_are_not_downloaded_with_a_memory_beside_it(hub, tmp_path):
    publish_model(hub, "me/model", tmp_path / "base")
    memory_for("me/model").push_to_hub("me/model", path_in_repo="memory")
    hub.requests.clear()
    RoutingMemory.from_pretrained("me/model", subfolder="memory", cache_dir=tmp_path / "cache")
    asked = {path.rpartition("/resolve/")[2].partition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert asked and all(path.startswith("memory/") for path in asked)


def test_the_recorded_commit_of_the_base_model_is_loaded_when_its_branch_has_moved(
    hub, base, wanted, tmp_path, tokens
):
    memory, logits = wanted
    memory.push_to_hub("me/mem")
    publish_model(hub, base, tmp_path / "newer", seed=9)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained("me/mem"), tokens), logits)


def test_a_revision_is_of_the_memory(hub, base, wanted, tokens):
    memory, logits = wanted
    memory.push_to_hub("me/mem", revision="v1")
    memory_for(base, seed=5).push_to_hub("me/mem", revision="v2")
    found = {v: AutoModelForCausalLM.from_pretrained("me/mem", revision=v) for v in ("v1", "v2")}
    assert torch.equal(logits_of(found["v1"], tokens), logits)
    assert not torch.equal(logits_of(found["v2"], tokens), logits)


@pytest.mark.parametrize("moment, skip", [(r"(GET|HEAD) .*/me/mem", 1), (r"GET .*/memory-|GET /cdn/", 0)])
def test_configuration_and_rows_are_of_one_commit_when_the_branch_moves_while_it_loads(
    hub, base, wanted, tokens, moment, skip
):
    memory, logits = wanted
    memory.push_to_hub("me/mem")
    old = dict(hub.files("me/mem"))
    memory_for(base, seed=5).push_to_hub("me/mem")
    new = dict(hub.files("me/mem"))
    hub.commit("me/mem", {name: None for name in new} | old)
    swap = lambda: hub.commit("me/mem", {name: None for name in old} | new)  # noqa: E731
    hub.faults.before(moment, swap, skip=skip)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained("me/mem"), tokens), logits)
    assert not torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained("me/mem", force_download=True), tokens), logits
    )


def test_a_token_reaches_the_memory_and_the_private_base_model(hub, tmp_path, monkeypatch, tokens):
    publish_model(hub, "me/secret", tmp_path / "base", private=True)
    memory_for("me/secret").push_to_hub("me/mem", private=True)
    monkeypatch.delenv("HF_TOKEN")
    cache = dict(cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained("me/mem", token=hub.token, **cache)
    assert get_memory(model).config.base_model_name_or_path == "me/secret"
    other = dict(cache_dir=tmp_path / "other")
    with pytest.raises(OSError) as error:
        AutoModelForCausalLM.from_pretrained("me/mem", token=hub.stranger_token, **other)
    assert "me/mem" in str(error.value)


def test_a_gated_base_model_is_named_with_the_way_out(hub, tmp_path, monkeypatch):
    publish_model(hub, "lab/gated", tmp_path / "base", gated=True, readers=("me",))
    memory_for("lab/gated").push_to_hub("me/mem")
    with pytest.raises(OSError) as error:
        AutoModelForCausalLM.from_pretrained("me/mem", token=hub.stranger_token, cache_dir=tmp_path / "cache")
    said = str(error.value)
    assert "the base model 'lab/gated' of this memory cannot be loaded" in said and "gated" in said
    assert "base_model_name_or_path=" in said


@pytest.mark.parametrize("place", [{}, {"subfolder": "memory"}], ids=["a repository", "beside the model"])
def test_what_was_loaded_once_loads_without_the_hub(hub, tmp_path, monkeypatch, tokens, place):
    name = "me/model" if place else "me/mem"
    publish_model(hub, "me/model", tmp_path / "base")
    memory_for("me/model").push_to_hub(name, path_in_repo=place.get("subfolder", ""))
    logits = logits_of(AutoModelForCausalLM.from_pretrained(name, **place), tokens)
    hub.requests.clear()
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(name, local_files_only=True, **place), tokens), logits
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(name, **place), tokens), logits)
    assert torch.equal(logits_of(KNNMoEForCausalLM.from_pretrained(name, **place), tokens), logits)
    assert not hub.requests
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path / "empty", **place)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(name, revision="never-seen", **place)


def python(code: str, hub, **variables) -> list:
    """What a Python process finds that a user starts: it reads the Hub's variables when it imports the client."""
    environment = os.environ | hub.environment | variables
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(re.search("FOUND (.*)", process.stdout)[1])


LOAD = """
import knnmoe_hf, json, torch
from transformers import AutoModelForCausalLM, pipeline
load = AutoModelForCausalLM.from_pretrained
models = [load("me/mem"), load("me/model", subfolder="memory")]
models.append(pipeline("text-generation", model="me/mem").model)
models.append(knnmoe_hf.KNNMoEForCausalLM.from_pretrained("me/model", memory="me/mem"))
sums = [model(input_ids=torch.arange(6)[None]).logits.sum().item() for model in models]
print("FOUND", json.dumps([[knnmoe_hf.active_memory(model) for model in models], sums]))
"""


@pytest.mark.slow
def test_processes_of_a_user_load_online_then_offline_then_while_the_hub_is_down(hub, tmp_path):
    publish_model(hub, "me/model", tmp_path / "base")
    memory = memory_for("me/model")
    memory.push_to_hub("me/mem")
    memory.push_to_hub("me/model", path_in_repo="memory")
    names, sums = python(LOAD, hub)
    assert names == ["default"] * 4 and len(set(sums)) == 1
    asked = len(hub.requests)
    assert python(LOAD, hub, HF_HUB_OFFLINE="1") == [names, sums]
    assert len(hub.requests) == asked
    hub.faults.fail("", status=503, times=-1)
    assert python(LOAD, hub) == [names, sums]
