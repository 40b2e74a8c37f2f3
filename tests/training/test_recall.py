"""Builds of memories that recall next tokens: built, judged, evaluated and saved as they will be used."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, disable_memory, use_memory
from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.models.attach import get_memory
from tests.support.models import tiny_model
from tests.support.training import build, examples, trainer_for
from tests.training.test_checks import refused

OPEN = {"confidence": "rbf", "num_neighbors": 4, "next_token_weight": 0.6}


@pytest.fixture
def olmoe():
    return tiny_model("olmoe")


def with_recall(memory: RoutingMemory, recall: str) -> RoutingMemory:
    return replace(memory, config=KNNMoEConfig.from_dict(memory.config.saved() | {"recall": recall}))


def loss(model, rows) -> float:
    """As `Trainer.evaluate` has it for examples of one length: the mean over all targets."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize("recall", ["next_tokens", "both"])
def test_a_trainer_evaluates_with_the_recall_that_it_builds_for(olmoe, tmp_path, recall):
    rows = examples()
    trainer = trainer_for(olmoe, tmp_path, config=OPEN | {"recall": recall}, allow_overlap=True)
    trainer.train()
    metrics = trainer.evaluate(rows)
    assert get_memory(olmoe).config.recall == recall == trainer.memory.config.recall
    attach_memory(olmoe, with_recall(trainer.memory, "routing"), "routing alone")
    with use_memory(olmoe, "routing alone"):
        routing = loss(olmoe, rows)
    with use_memory(olmoe, "default"):
        assert metrics["eval_loss"] == pytest.approx(loss(olmoe, rows), abs=1e-4)
    with disable_memory(olmoe):
        assert metrics["eval_base_loss"] == pytest.approx(loss(olmoe, rows), abs=1e-4)
    assert metrics["eval_loss"] < min(routing, metrics["eval_base_loss"]) - 0.1


def test_the_rows_are_those_of_a_build_for_routing_alone(olmoe, tmp_path):
    routing = build(olmoe, tmp_path / "routing", config=OPEN)
    both = build(olmoe, tmp_path / "both", config=OPEN | {"recall": "both"})
    for layer, rows in both.layers.items():
        for name, tensor in rows.tensors().items():
            assert torch.equal(tensor, routing.layers[layer].tensors()[name]), name
    assert torch.equal(both.next_tokens, routing.next_tokens) and len(both.next_tokens) == len(both)


def test_the_verdict_is_of_the_recall_that_was_built_for(olmoe, tmp_path):
    config = OPEN | {"recall": "both"}
    memory = build(olmoe, tmp_path, examples(40, 24), config=config, trainer={"ordinary_dataset": examples(8, seed=9)})
    assert memory.verdict.settings["recall"] == "both" and memory.verdict.holds_for(memory.config)
    assert with_recall(memory, "routing").verdict is None
    assert (
        replace(memory, config=KNNMoEConfig.from_dict(memory.config.saved() | {"next_token_weight": 0.1})).verdict
        is None
    )


def test_recall_is_saved_and_opened_again(olmoe, tmp_path):
    trainer = trainer_for(olmoe, tmp_path, config=OPEN | {"recall": "both"})
    trainer.train()
    trainer.save_model()
    opened = RoutingMemory.from_pretrained(tmp_path / "out")
    assert opened.config.recall == "both" and torch.equal(opened.next_tokens, trainer.memory.next_tokens)
    assert opened.stored_next_tokens is None and opened.provenance.has_text


# what is saved


@pytest.mark.parametrize("level", ["ids", "none"])
def test_next_tokens_are_saved_if_the_arguments_say_so(olmoe, tmp_path, hub, level):
    trainer = trainer_for(olmoe, tmp_path, config=OPEN, save_provenance=level, save_next_tokens=True)
    trainer.train()
    trainer.save_model()
    opened = RoutingMemory.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.stored_next_tokens, trainer.memory.next_tokens)
    assert opened.provenance is None or not opened.provenance.has_text
    trainer.push_to_hub()  # in their order they are the text, which is uploaded only if it is asked for
    assert RoutingMemory.from_pretrained("me/out").next_tokens is None
    trainer.push_to_hub(next_tokens=True)
    assert torch.equal(RoutingMemory.from_pretrained("me/out").next_tokens, trainer.memory.next_tokens)


@pytest.mark.parametrize("level", ["ids", "none"])
def test_a_build_whose_memory_would_lack_what_it_needs_is_refused_before(olmoe, tmp_path, level):
    words = ("recall='both'", f"save_provenance='{level}'", "save_next_tokens=True", "recall='routing'")
    refused(olmoe, tmp_path, *words, config={"recall": "both"}, save_provenance=level)
    trainer_for(olmoe, tmp_path, config={"recall": "both"}, save_provenance=level, save_next_tokens=True)


def test_an_upload_that_would_lack_them_is_refused_before_the_build(olmoe, tmp_path):
    words = ("push_to_hub=True", "recall='next_tokens'", "push_to_hub(next_tokens=True)")
    refused(olmoe, tmp_path, *words, config={"recall": "next_tokens"}, push_to_hub=True)


def test_a_model_without_a_head_is_refused_before_the_build(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "model")
    headless = AutoModel.from_pretrained(tmp_path / "model")
    trainer = trainer_for(headless, tmp_path, config={"recall": "both"})
    trainer.make_builder = lambda: pytest.fail("the build began")
    with pytest.raises(UnsupportedModelError, match="no output embeddings"):
        trainer.train()
