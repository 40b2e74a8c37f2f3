"""What a comparison would take: bytes from the model's configuration, seconds from one measured forward."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.comparison.costs import wait
from knnmoe_hf.comparison.plan import ComparisonPlan
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.memory.size import PUBLISHED, plan_memory
from knnmoe_hf.tasks.items import Item

TOKENS_OF_REFERENCE = 200
"""Tokens of a reference item, for an estimate without the data: derived from the paper's own figures of memory."""
_BACKWARD = 2.0
"""A backward pass takes about twice as long as a forward pass."""
_MEASURED = 5


@dataclass(frozen=True)
class Space:
    """
    Bytes, as far as they can be known before a run.

    Attributes:
        weights: of the model.
        rows: of a memory of all references of the largest task, with the default options.
        tokens: the reference tokens that `rows` is for.
    """

    weights: int
    rows: int
    tokens: int


def space(plan: ComparisonPlan, dtype: torch.dtype | None = None, tokens: int | None = None) -> Space:
    """
    What model and memory take; no weight is loaded.

    Args:
        plan: whose model is one of `PUBLISHED`, or a folder or repository with a `config.json`.
        dtype: of the weights; None for the one that they are saved in, bfloat16 if that is not said.
        tokens: reference tokens of the largest task; None for a rough guess.

    Raises:
        OSError: if the model's configuration cannot be read.
    """
    place = plan.model_place
    config = PUBLISHED.get(place) or AutoConfig.from_pretrained(place)
    dtype = dtype or config.dtype or torch.bfloat16
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    with torch.device("meta"):
        model = kind.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    tokens = tokens or (plan.settings.references or 1000) * TOKENS_OF_REFERENCE
    return Space(weights, plan_memory(place, tokens, KNNMoEConfig()).nbytes, tokens)


def seconds_of_token(model: PreTrainedModel, lengths: Sequence[int]) -> float:
    """Seconds of a forward pass over a sequence of the median length, divided by its tokens: the quickest of a few."""
    length = max(1, sorted(lengths)[len(lengths) // 2])
    ids = torch.ones(1, length, dtype=torch.long, device=next(model.parameters()).device)
    seconds = []
    with torch.no_grad():
        for _ in range(_MEASURED):
            wait(model)
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            wait(model)
            seconds.append(time.perf_counter() - started)
    return min(seconds) / length


def seconds_of_methods(
    methods: Mapping[str, Method], token_seconds: float, items: int, item_tokens: float, references: Sequence[Item]
) -> dict[str, float]:
    """
    About how long each method takes on one task, by its passes: fitting and answering.

    Args:
        methods: by label.
        token_seconds: of a forward pass, for each token.
        items: test items, those of off-domain tasks included.
        item_tokens: tokens that are read to score an item, in all its forward passes.
        references: that the methods are fitted on.
    """
    length = sum(len(item.tokens) for item in references) / max(1, len(references))
    found = {}
    for label, method in methods.items():
        fit = method.fit_passes * len(references) * length * (1 + _BACKWARD)
        passes = method.cost.forward + _BACKWARD * method.cost.backward
        answers = items * (item_tokens + passes * length + method.cost.prompt_tokens)
        found[label] = token_seconds * (fit + answers)
    return found


def sentences(where: Space, seconds: Mapping[str, float] | None) -> Iterable[str]:
    """The estimate in words, one line each."""
    rows = f"{_size(where.rows)} for the rows of {where.tokens:,} reference tokens"
    yield f"memory: about {_size(where.weights)} for the weights and {rows}; methods with gradients need more"
    if seconds is None:
        yield "time: not known before the model is loaded, as it is estimated from one measured forward pass"
        return
    parts = ", ".join(f"{label} {duration(value)}" for label, value in seconds.items())
    yield f"time: about {duration(sum(seconds.values()))} ({parts}), from one measured forward pass"


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
