"""Memories that were really built for lab models: nothing is found in them, and hostile rows in them are."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory, detach_memory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents
from knnmoe_hf.memory.audit import audit
from tests.memory.audit.poison import KINDS, MANY, poisoned

pytestmark = pytest.mark.slow

BUILDS = {
    "olmoe": ("olmoe", "topics", {}),
    "olmoe, python": ("olmoe", "python", {}),
    "gpt_oss": ("gpt_oss", "topics", {}),
    "deepseek_v3": ("deepseek_v3", "topics", {"key_codec": "raw", "key_dtype": "bfloat16", "value_dtype": "float16"}),
    "delta": ("qwen3_moe", "topics", {"value_space": "delta"}),
    "assignment": ("olmoe", "topics", {"value_space": "assignment", "key_codec": "logits"}),
}


def built(name: str, folder: Path) -> RoutingMemory:
    """Of 12 windows of 64 tokens, with the default builder."""
    family, kind, options = BUILDS[name]
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[family], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[family])
    text = "\n\n".join(documents(kind, "test"))[:20000]
    ids = torch.tensor(tokenizer(text)["input_ids"][: 12 * 64]).view(12, 64).tolist()
    args = KNNMoETrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": window, "labels": window} for window in ids]
    config = KNNMoEConfig(**({"confidence": "context"} | options))
    trainer = KNNMoETrainer(model, args, train_dataset=rows, config=config)
    trainer.train()
    detach_memory(model)
    return trainer.memory


@pytest.fixture(scope="module", params=BUILDS)
def memory(request, tmp_path_factory) -> RoutingMemory:
    return built(request.param, tmp_path_factory.mktemp("build"))


def test_nothing_is_found_in_a_memory_that_was_built(memory):
    assert [(f.check, f.layer, f.sentence) for f in audit(memory).findings] == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1], ids=["one row", "1 %", "10 %"])
@pytest.mark.parametrize(
    "kind", ["keys at the centre, one expert", "keys at the centre", "one expert far above the others"]
)
def test_hostile_rows_in_a_memory_that_was_built_are_found(memory, kind, share):
    if memory.config.value_space == "assignment" and kind == "one expert far above the others":
        pytest.skip("weights of experts are bounded by those of the gate")
    bad, where = poisoned(memory, KINDS[kind], share)
    found = audit(bad).findings
    assert found and float(torch.stack([f.rows for f in found]).any(dim=0)[where].float().mean()) > 0.9


def test_a_contrary_tenth_of_a_memory_that_was_built_is_found(memory):
    if memory.config.value_space == "logits":
        assert audit(poisoned(memory, MANY["the contrary of the values"], 0.1)[0]).findings
