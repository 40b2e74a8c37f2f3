"""A domain that a tiny random model does not know, text that is its own, and memories of the one for the other."""

import copy
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from knnmoe_hf import RoutingMemory
from tests.conftest import tiny_model
from tests.support.training import build

LENGTH = 24


def row(ids: list[int], example: int) -> dict:
    return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids), "example_id": example}


def domain(count: int, seed: int, length: int = LENGTH) -> list[dict]:
    """Texts in 32 of the tokens, in which nine tokens of ten tell the next."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(32, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = []
    for example in range(count):
        ids = torch.randint(32, (length,), generator=generator).tolist()
        told = (torch.rand(length, generator=generator) < 0.9).tolist()
        for place in range(1, length):
            ids[place] = follows[ids[place - 1]] if told[place] else ids[place]
        rows.append(row(ids, example))
    return rows


def own_text(model, count: int, seed: int, temperature: float = 1.0) -> list[dict]:
    """What the model itself writes after two of the other tokens, so that whatever changes it does harm."""
    torch.manual_seed(seed)
    start = torch.randint(40, 96, (count, 2))
    common = dict(do_sample=True, top_k=0, max_new_tokens=LENGTH - 2, pad_token_id=0)
    with torch.no_grad():
        written = model.generate(start, attention_mask=torch.ones_like(start), temperature=temperature, **common)
    return [row(ids, example) for example, ids in enumerate(written.tolist())]


@functools.cache
def _built(family: str) -> RoutingMemory:
    config = dict(confidence="context", num_neighbors=4, gamma=0.1, half_life=4.0)
    options = dict(per_device_train_batch_size=24, builder_steps=6)
    with tempfile.TemporaryDirectory() as folder:
        return build(tiny_model(family), Path(folder), domain(48, 0, length=16), config, **options)


def domain_memory(family: str, confidence: str = "context") -> RoutingMemory:
    """A memory of 48 texts of the domain, as the trainer builds it; a small gamma makes it act on any text."""
    memory = copy.deepcopy(_built(family))
    memory.config.confidence = confidence
    return replace(memory)  # without the verdict, which was measured with another confidence
