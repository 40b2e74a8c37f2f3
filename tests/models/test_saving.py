"""Saving a model says once that its memory is not among its weights, and nothing else says it."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_model
from transformers import Trainer, TrainingArguments

from knnmoe_hf import RoutingMemory, attach_memory, attach_override, detach_memory, get_memory
from tests.support.models import random_memory, tiny_model

LORA = LoraConfig(target_modules=["q_proj"], r=2)


@pytest.fixture
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture
def said(caplog) -> Callable[[], list[str]]:
    """Gives what was said of saving so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [text for text in caplog.messages if "does not save the memory" in text]


def test_saving_a_model_says_once_how_to_save_its_memory(model, tmp_path, said):
    attach_memory(model, random_memory(model), "law")
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    (text,) = said()
    assert "'law'" in text and "get_memory(model).save_pretrained(" in text and "\n" not in text
    get_memory(model).save_pretrained(tmp_path / "memory")  # the way that it names
    assert len(RoutingMemory.from_pretrained(tmp_path / "memory")) == 40


def test_several_memories_are_all_named(olmoe, tmp_path, said):
    for name in ("law", "medicine"):
        attach_memory(olmoe, random_memory(olmoe), name)
    olmoe.save_pretrained(tmp_path)
    (text,) = said()
    assert "'law', 'medicine'" in text and "get_memory(model, name)" in text


def trained(model, folder, tokens) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    arguments = TrainingArguments(str(folder), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


SAVES = {
    "peft": lambda model, folder, _: get_peft_model(model, LORA).save_pretrained(folder),
    "torch": lambda model, folder, _: torch.save(model.state_dict(), folder / "weights.pt"),
    "safetensors": lambda model, folder, _: save_model(model, str(folder / "weights.safetensors")),
    "trainer": lambda model, folder, tokens: trained(get_peft_model(model, LORA), folder, tokens).save_model(),
    "compiled": lambda model, folder, _: torch.compile(model).save_pretrained(folder),
    "a copy": lambda model, folder, _: copy.deepcopy(model).save_pretrained(folder),
}


@pytest.mark.parametrize("way", SAVES)
def test_it_is_said_whoever_saves(olmoe, tmp_path, tokens, said, way):
    attach_memory(olmoe, random_memory(olmoe))
    SAVES[way](olmoe, tmp_path, tokens)
    assert len(said()) == 1


def test_what_saves_nothing_says_nothing(olmoe, tmp_path, tokens, said):
    get_peft_model(tiny_model("olmoe"), LORA).save_pretrained(tmp_path)
    attach_memory(olmoe, random_memory(olmoe))
    olmoe(input_ids=tokens)
    olmoe.generate(tokens[:1], max_new_tokens=2, do_sample=False)
    copy.deepcopy(olmoe)
    olmoe.load_state_dict(tiny_model("olmoe").state_dict())
    attach_memory(olmoe, random_memory(olmoe, seed=2), "second")
    adapted = PeftModel.from_pretrained(olmoe, tmp_path, is_trainable=True)
    adapted.load_adapter(str(tmp_path), "other")
    trained(adapted, tmp_path / "out", tokens)
    assert said() == []
    native = tiny_model("olmoe")
    attach_memory(native, random_memory(native))
    native.load_adapter(str(tmp_path))
    assert said() == []
    native.save_pretrained(tmp_path / "saved")  # loading has not used the warning up
    assert len(said()) == 1


def test_a_model_without_a_memory_says_nothing(olmoe, tmp_path, said):
    olmoe.save_pretrained(tmp_path / "never")
    attach_override(olmoe, {0: lambda x, output, tokens: None})
    olmoe.save_pretrained(tmp_path / "override")
    detach_memory(olmoe)
    attach_memory(olmoe, random_memory(olmoe))
    detach_memory(olmoe)
    olmoe.save_pretrained(tmp_path / "detached")
    assert said() == []
    assert not any(module._state_dict_pre_hooks for module in olmoe.modules())
