"""A model whose gates are trained goes on with its memory, which is said once; what is no training is refused."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from knnmoe_hf import attach_memory, detach_memory, disable_memory
from knnmoe_hf.errors import MemoryMismatchError
from tests.models.changed_gates import CHANGES, gate_of
from tests.models.test_attach import logits_of
from tests.support.models import random_memory, tiny_model


@pytest.fixture
def said(caplog):
    """Gives what was said of trained gates so far."""
    caplog.set_level("WARNING")
    return lambda: [text for text in caplog.messages if "the gates are trained while a memory is attached" in text]


def train(model, tokens, steps: int = 3, called=None) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        (model if called is None else called)(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


CHECKPOINTS = {
    "plain": None,
    "checkpoints": {"use_reentrant": False},
    "reentrant checkpoints": {"use_reentrant": True},
}


@pytest.mark.parametrize("way", CHECKPOINTS)
@pytest.mark.parametrize("eval_between", [False, True])
def test_gates_may_be_trained_with_a_memory_attached(model, tokens, said, way, eval_between):
    memory = random_memory(model)
    attach_memory(model, memory)
    if CHECKPOINTS[way] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTS[way])
        model.enable_input_require_grads()
    for _ in range(2):
        train(model, tokens, steps=2)
        if eval_between:
            logits_of(model, tokens)
    found = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), found)
    with disable_memory(model):
        assert not torch.equal(logits_of(model, tokens), found)
    model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(said()) == 1
    detach_memory(model)
    with pytest.raises(MemoryMismatchError, match="not those that this memory was built for"):
        attach_memory(model, memory)


@pytest.mark.parametrize("change", ["load_state_dict", "weight.data.copy_", "another parameter", "top_k"])
def test_a_change_after_training_is_refused(model, tokens, change):
    attach_memory(model, random_memory(model))
    train(model, tokens)
    logits_of(model, tokens)
    CHANGES[change](model)
    with pytest.raises(MemoryMismatchError):
        logits_of(model, tokens)


@pytest.mark.parametrize("frozen", ["the gates", "no gradients"])
def test_a_change_of_gates_that_are_not_trained_is_refused_in_training_mode(model, tokens, frozen, said):
    attach_memory(model, random_memory(model))
    if frozen == "the gates":
        for layer in range(2):
            gate_of(model, layer).requires_grad_(False)
    model.train()
    with torch.set_grad_enabled(frozen == "the gates"):
        model(input_ids=tokens)
        CHANGES["weight.data.copy_"](model)
        with pytest.raises(MemoryMismatchError):
            model(input_ids=tokens)
    assert not said()


def test_frozen_gates_say_nothing(model, tokens, said):
    attach_memory(model, random_memory(model))
    for layer in range(2):
        gate_of(model, layer).requires_grad_(False)
    train(model, tokens)
    logits_of(model, tokens)
    assert not said()


def test_a_trainer_trains_the_gates_and_evaluates(model, tokens, tmp_path, said):
    attach_memory(model, random_memory(model))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="no", report_to="none",
        disable_tqdm=True, learning_rate=1e-2, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and len(said()) == 1


def test_a_compiled_model_may_be_trained(tokens, said):
    model = tiny_model("olmoe")
    model.set_experts_implementation("batched_mm")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        attach_memory(one, random_memory(one))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(model, tokens, called=compiled)
    train(twin, tokens)
    torch.testing.assert_close(logits_of(compiled, tokens), logits_of(twin, tokens), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(twin, tokens), atol=1e-4, rtol=1e-4)
    CHANGES["weight.data.copy_"](model)
    with pytest.raises(MemoryMismatchError):
        logits_of(compiled, tokens)
    assert len(said()) == 2
