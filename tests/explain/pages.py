"""A trace of difficult text with a memory of the lab model, and its page."""

import base64
import json
import re

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import RoutingMemory, attach_memory, trace_routing
from knnmoe_hf.explain.trace import RoutingTrace
from knnmoe_hf.lab import LAB_MODELS
from tests.support.models import random_memory

HARD = (
    'def f():\n\treturn "<b>&amp;</b></script><!-- <script>alert(1)</script>"\n'
    "שלום עולם, مرحبا بالعالم, 漢字, 🙂, \u200b, \u202e, \x07 and \u2028.\n"
)
"""Markup, text from right to left, letters that are several tokens, and characters that cannot be seen."""


def lab_trace(text: str = HARD, rows: int = 60, **options) -> RoutingTrace:
    """A trace of one forward over a text, by a memory that knows its references' text."""
    torch.manual_seed(0)
    name = str(LAB_MODELS["olmoe"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    attach_memory(model, with_text(random_memory(model, rows=rows, **options), tokenizer))
    with torch.no_grad(), trace_routing(model) as trace:
        model(input_ids=tokenizer(text, return_tensors="pt").input_ids)
    return trace


def with_text(memory: RoutingMemory, tokenizer) -> RoutingMemory:
    """The memory with rows that come from two examples of difficult text."""
    from dataclasses import replace

    from knnmoe_hf.memory.provenance import Provenance

    texts = {7: torch.tensor(tokenizer(HARD * 4).input_ids), 9: torch.tensor(tokenizer("A gate.\n" * 40).input_ids)}
    example = torch.arange(len(memory)) % 2 * 2 + 7
    position = torch.arange(len(memory)) * 3 % (min(map(len, texts.values())) - 1)
    nll = torch.ones(len(memory))
    provenance = Provenance.build(example, position.int(), nll, nll / 2, texts)
    return replace(memory, provenance=provenance, tokenizer=tokenizer, stored_next_tokens=None)


def data_of(page: str) -> dict:
    """The data inside a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def numbers(packed: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), dtype)


def fixed(packed: dict) -> np.ndarray:
    """Numbers of 16 bits as what they stand for."""
    steps = numbers(packed["steps"], "<u2").astype(float)
    return np.where(steps == 65_535, np.nan, steps / 65_534 * packed["largest"])
