"""Shared by the tests of memories: a tokenizer, a look at a folder, equality of memories."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory.manifest import CalibrationRecord, seal
from knnmoe_hf.memory.provenance import Provenance
from tests.support.models import random_memory


def tiny_tokenizer(words: str = "the gate of an expert") -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


def rows_for(rows=6, width=32, experts=8, layers=(0, 1)):
    return {i: torch.randn(rows, width) for i in layers}, {i: torch.randn(rows, experts) for i in layers}


def build(model, keys, values, example_ids=None, **options):
    return RoutingMemory.from_rows(KNNMoEConfig(**options), keys, values, model, example_ids)


def full_memory(model, examples=(0, 1, 2, 3), seed: int = 1, tokenizer=None, **options) -> RoutingMemory:
    """A memory as the trainer builds it: ten rows per example, with positions, NLLs and each example's tokens."""
    space = {name: value for name, value in options.items() if name == "value_space"}
    bare = random_memory(model, rows=10 * len(examples), seed=seed, **space)
    config = KNNMoEConfig(**(bare.config.options() | options))
    ids = torch.tensor(examples).repeat_interleave(10)
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand(len(ids), generator=generator) + 1
    tokens = {example: torch.randint(96, (11,), generator=generator) for example in examples}
    provenance = Provenance.build(ids, torch.arange(10).repeat(len(examples)), before, before / 2, tokens)
    tables = [{i: getattr(rows, f"decoded_{name}") for i, rows in bare.layers.items()} for name in ("keys", "values")]
    return RoutingMemory.build(config, *tables, model, provenance, tokenizer, "5e7" * 16)


def background(source: str = "this machine", **given) -> dict:
    """What a calibration read of one kind of text."""
    return {"source": source, "files": ["a.py", "b.py"], "examples": 2, "tokens": 512, "sha256": "5e" * 32} | given


def calibration_record(**given) -> CalibrationRecord:
    """Of two kinds of background text, of which the memory helps on one; next tokens are recalled with routing."""
    known = dict(threshold=0.6, gain=0.3, open_gain=0.4, harm={"python": 0.002}, excluded=["law"])
    known["fits"] = {"both": RecallFit(0.5, 0.2, 0.4, 0.25, 64, 0.6, {"python": 0.003})}
    kinds = {"python": background(), "law": background("given", files=[])}
    return CalibrationRecord(**(known | {"background": kinds} | given))


def refused(folder, *words, error=MemoryFileError, **options) -> str:
    """Opening the folder fails in one line that contains these words."""
    with pytest.raises(error) as caught:
        RoutingMemory.from_pretrained(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_config(folder: Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def edit_config(folder: Path, change, sealed: bool = True) -> None:
    before, content = read_config(folder), read_config(folder)
    change(content)
    write_config(folder, content, before if sealed else {})


def write_config(folder: Path, content: dict, before: dict) -> None:
    """As an attacker would who knows that the entry `memory` is sealed; not so if `before` is empty."""
    entry = content.get("memory")
    if before and isinstance(entry, dict) and entry.get("sha256") == before["memory"]["sha256"]:
        entry["sha256"] = seal(entry)
    (Path(folder) / "config.json").write_text(json.dumps(content))


def shards(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_same(one: RoutingMemory, other: RoutingMemory) -> None:
    assert one.config.options() == other.config.options()
    assert one.config.base_model_name_or_path == other.config.base_model_name_or_path
    assert one.config.base_model_revision == other.config.base_model_revision
    assert one.origin == other.origin and one.calibration == other.calibration and one.verdict == other.verdict
    assert one.task_record == other.task_record
    assert list(one.layers) == list(other.layers)
    for layer, rows in one.layers.items():
        theirs = other.layers[layer]
        assert_same_tensors(rows.tensors(), theirs.tensors())
        for name in ("scale", "stats", "hidden_size", "num_experts"):
            assert getattr(rows, name) == getattr(theirs, name), name
        assert rows.encoder.of_logits == theirs.encoder.of_logits
    assert (one.provenance is None) == (other.provenance is None)
    if one.provenance is not None:
        for field in dataclasses.fields(one.provenance):
            assert torch.equal(getattr(one.provenance, field.name), getattr(other.provenance, field.name)), field.name
    assert (one.stored_next_tokens is None) == (other.stored_next_tokens is None)
    assert (one.next_tokens is None) == (other.next_tokens is None)
    if one.next_tokens is not None:
        assert torch.equal(one.next_tokens, other.next_tokens)
    assert (one.tokenizer is None) == (other.tokenizer is None)
    if one.tokenizer is not None:
        assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
