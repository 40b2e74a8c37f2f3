"""Memories of several settings from one build are those that a build of each would make."""

import pytest
import torch

from benchmarks.builds import training_arguments
from benchmarks.effect import memories as module
from benchmarks.effect.memories import Memories
from benchmarks.effect.settings import DEFAULT, Setting
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, detach_memory
from knnmoe_hf.data.examples import prepare_dataset
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer


def references(count: int = 12) -> list[dict]:
    """Of bytes that no text of this machine has, so that a memory of them harms there and can be calibrated."""
    rows = [[128 + (i * j + j * j) % 100 for j in range(1, 50)] for i in range(count)]
    return prepare_dataset([{"input_ids": row, "labels": row} for row in rows], None, None)


@pytest.fixture
def lab():
    """A model, its tokenizer, and memories for it."""
    model, tokenizer = tiny_model("olmoe", vocab_size=260, max_position_embeddings=512), byte_tokenizer()
    return model, tokenizer, Memories(model, tokenizer, references(), seed=0)


def built(model, tokenizer, folder, config: dict):
    """By the library alone."""
    arguments, options = training_arguments({"seed": 0}, str(folder)), KNNMoEConfig(**config)
    trainer = KNNMoETrainer(model, arguments, None, references(), None, tokenizer, config=options)
    trainer.train()
    detach_memory(model)
    return trainer.memory


@pytest.mark.parametrize(
    "config", [{}, {"key_codec": "logits", "gamma": 0.9}, {"num_neighbors": 4, "value_dtype": "float16"}]
)
def test_a_memory_stored_otherwise_and_calibrated_is_the_one_that_a_build_makes(config, lab, tmp_path):
    model, tokenizer, memories = lab
    memories.of(DEFAULT)
    found, expected = memories.of(Setting("one", "rows", config=config)).memory, built(*lab[:2], tmp_path, config)
    assert found.config.options() == expected.config.options()
    for layer, rows in expected.layers.items():
        tensors = found.layers[layer].tensors()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in rows.tensors().items())
        assert found.layers[layer].stats == rows.stats and rows.stats is not None
    assert found.calibration == expected.calibration


def test_settings_share_a_build_and_a_calibration(lab, monkeypatch):
    counts = {"build": 0, "calibrate": 0}

    def counted(name, run):
        def call(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return call

    monkeypatch.setattr(KNNMoETrainer, "train", counted("build", KNNMoETrainer.train))
    monkeypatch.setattr(module, "calibrate", counted("calibrate", module.calibrate))
    memories = lab[2]
    used = [{}, {"recall": "both"}, {"recall": "next_tokens", "next_token_weight": 0.1}, {"confidence": "rbf"}]
    found = [memories.of(Setting(str(i), "rows", config=config)) for i, config in enumerate(used)]
    assert counts == {"build": 1, "calibrate": 1}
    assert [one.memory.config.recall for one in found] == ["routing", "both", "next_tokens", "routing"]
    assert found[0].seconds == found[1].seconds > found[3].seconds > 0
    memories.of(Setting("other keys", "rows", config={"key_codec": "raw"}))
    memories.of(Setting("python", "rows", background=("python",)))
    assert counts == {"build": 1, "calibrate": 3}
    memories.of(Setting("fewer", "rows", references=6))
    memories.of(Setting("other values", "rows", config={"value_space": "delta"}))
    assert counts["build"] == 3


def test_built_rows_are_kept_for_other_runs(lab, tmp_path, monkeypatch):
    model, tokenizer, memories = lab
    setting = Setting("one", "rows", config={"confidence": "rbf"})
    expected = memories.of(setting)
    first = Memories(model, tokenizer, references(), 0, tmp_path / "kept").of(setting)
    monkeypatch.setattr(KNNMoETrainer, "train", None)
    again = Memories(model, tokenizer, references(), 0, tmp_path / "kept").of(setting)
    assert again.seconds > 0.5 * first.seconds > 0
    for found in (first, again):
        for layer, rows in expected.memory.layers.items():
            tensors = found.memory.layers[layer].tensors()
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in rows.tensors().items())
        assert torch.equal(found.memory.next_tokens, expected.memory.next_tokens)
