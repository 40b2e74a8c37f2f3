"""Which way a memory is opened or attached, its recall is that of the call, and a memory that cannot is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from knnmoe_hf import KNNMoEConfig, KNNMoEForCausalLM, RoutingMemory, attach_memory, calibrate, use_memory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.models.attach import get_memory
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import PLAIN, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("olmoe").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(base) -> RoutingMemory:
    """With the text of its references."""
    return full_memory(AutoModelForCausalLM.from_pretrained(base), tokenizer=tiny_tokenizer(), **PLAIN)


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory) -> str:
    """Without the text, with next tokens."""
    folder = str(tmp_path_factory.mktemp("saved"))
    whole.save_pretrained(folder, provenance=False, next_tokens=True)
    return folder


@pytest.fixture(scope="module")
def poor(whole, tmp_path_factory) -> str:
    """With neither."""
    folder = str(tmp_path_factory.mktemp("poor"))
    whole.save_pretrained(folder, provenance="ids")
    return folder


WAYS = {
    "RoutingMemory": lambda name, base: RoutingMemory.from_pretrained(name, recall="both"),
    "AutoModelForCausalLM": lambda name, base: AutoModelForCausalLM.from_pretrained(name, recall="both"),
    "with a config": lambda name, base: AutoModelForCausalLM.from_pretrained(
        name, config=AutoConfig.from_pretrained(name, recall="both")
    ),
    "KNNMoEForCausalLM": lambda name, base: KNNMoEForCausalLM.from_pretrained(name, recall="both"),
    "KNNMoEForCausalLM with its base": lambda name, base: KNNMoEForCausalLM.from_pretrained(
        base, memory=name, recall="both"
    ),
    "pipeline": lambda name, base: pipeline("text-generation", model=name, model_kwargs={"recall": "both"}).model,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_takes_the_recall_that_is_asked_for(way, base, saved):
    found = WAYS[way](saved, base)
    memory = found if isinstance(found, RoutingMemory) else get_memory(found)
    assert memory.config.recall == "both" and len(memory.next_tokens) == len(memory) == 40
    assert RoutingMemory.from_pretrained(saved).config.recall == "routing"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_refuses_a_memory_without_next_tokens(way, base, poor):
    kind = ValueError if way == "pipeline" else MemoryMismatchError  # which puts all that it has tried into its own
    with pytest.raises(kind, match="recall='both' is not possible: this memory has neither") as caught:
        WAYS[way](poor, base)
    assert "use recall='routing'" in str(caught.value) and ("\n" in str(caught.value)) == (way == "pipeline")


def test_a_calibration_refuses_it_too(base, poor):
    model, memory = AutoModelForCausalLM.from_pretrained(base), RoutingMemory.from_pretrained(poor)
    memory.config.recall = "next_tokens"
    with pytest.raises(MemoryMismatchError, match="recall='next_tokens' is not possible"):
        calibrate(model, memory, {"other": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]})


def test_text_and_stored_tokens_give_the_same_logits_and_another_recall_others(base, whole, saved, tokens):
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = {"recall": "both", "next_token_weight": 0.5}
    text = replace(whole, config=KNNMoEConfig.from_dict(whole.config.saved() | asked))
    attach_memory(model, text, "text")
    attach_memory(model, RoutingMemory.from_pretrained(saved, **asked), "stored")
    attach_memory(model, RoutingMemory.from_pretrained(saved), "routing")
    found = {}
    for name in ("text", "stored", "routing"):
        with use_memory(model, name), torch.no_grad():
            found[name] = model(input_ids=tokens).logits
    assert torch.equal(found["text"], found["stored"]) and not torch.equal(found["text"], found["routing"])
