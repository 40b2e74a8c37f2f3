"""What a memory costs inside a model: base and memory in turns, and what its lookups find there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.measuring import synchronize, timed
from knnmoe_hf import RoutingMemory, disable_memory
from knnmoe_hf.lookup.torch_lookup import LayerLookup
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.search import Neighbors, StoredKeys
from knnmoe_hf.search.exact import TorchSearch

Rounds = dict[str, list[list[float]]]
"""Seconds of single forwards, `{"base": [round], "memory": [round]}`, as many in each round of both."""
SIDES = ("base", "memory")


def side(model: nn.Module, name: str):
    """A context in which the model runs without or with its memory."""
    return disable_memory(model) if name == "base" else nullcontext()


def _turns(rounds: int) -> Iterator[tuple[int, str]]:
    """Round -1 warms up; each begins with one and ends with the other way round, so that a drift favours neither."""
    for turn in range(-1, rounds):
        for name in (*SIDES, *reversed(SIDES)):
            yield turn, name


@torch.no_grad()
def decoding(model: nn.Module, prompt: Tensor, text: Tensor, rounds: int) -> Rounds:
    """
    Seconds of each decoding step, the same tokens for both.

    Args:
        model: with a memory in force.
        prompt: (1, P) tokens that both caches begin with.
        text: (rounds + 1, steps) tokens that follow.
        rounds: timed; one more warms up.
    """
    caches = {}
    for name in SIDES:  # a cache that was filled without the memory lacks what the memory needs to go on
        caches[name] = DynamicCache(config=model.config)
        with side(model, name):
            model.base_model(input_ids=prompt, past_key_values=caches[name])
    found: Rounds = {name: [[] for _ in range(rounds)] for name in SIDES}
    for turn in range(-1, rounds):
        for place, token in enumerate(text[turn + 1].view(-1, 1, 1)):  # in turns at each token: the machine has moods
            for name in SIDES if (turn + place) % 2 else reversed(SIDES):
                with side(model, name):
                    spent = timed(partial(model, input_ids=token, past_key_values=caches[name]), model.device)
                if turn >= 0:
                    found[name][turn].append(spent)
    return found


@torch.no_grad()
def prefilling(model: nn.Module, text: Tensor, rounds: int) -> Rounds:
    """
    Seconds of the decoder's forward that fills a cache, twice on each of `text` (rounds + 1, S).

    The head is left out. `generate` runs it on the last token alone, and for such a slice torch 2.13 copies the head's
    weights on a CPU: a second at OLMoE's size, beside which any other cost would look small.
    """
    found: Rounds = {name: [[] for _ in range(rounds)] for name in SIDES}
    for turn, name in _turns(rounds):
        with side(model, name):
            asked = dict(input_ids=text[turn + 1][None], use_cache=True)
            spent = timed(partial(model.base_model, **asked), model.device)
        if turn >= 0:
            found[name][turn].append(spent)
    return found


@contextmanager
def timed_lookups(device: torch.device) -> Iterator[list[float]]:
    """A list that gets the seconds of every lookup inside, with the caches as the model leaves them."""
    spent: list[float] = []
    call = LayerLookup.__call__

    def timed_call(*args, **kwargs):
        synchronize(device)
        started = time.perf_counter()
        found = call(*args, **kwargs)
        synchronize(device)
        spent.append(time.perf_counter() - started)
        return found

    with mock.patch.object(LayerLookup, "__call__", timed_call):
        yield spent


@torch.no_grad()
def lookups_within(model: nn.Module, prompt: Tensor, text: Tensor) -> dict[str, list[float]]:
    """Seconds of single lookups: in the prefill of a prompt (1, P), and in decoding a text (1, S) after it."""
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=prompt, use_cache=False)
    with timed_lookups(model.device) as prefill:
        model.base_model(input_ids=prompt, past_key_values=cache)
    model(input_ids=text[:, :1], past_key_values=cache)
    with timed_lookups(model.device) as decode:
        for token in text[0, 1:].view(-1, 1, 1):
            model(input_ids=token, past_key_values=cache)
    return {"prefill": prefill, "decode": decode}


@torch.no_grad()
def seen_by_gates(model: nn.Module, text: Tensor) -> tuple[dict[int, Tensor], dict[int, Neighbors], dict[int, Tensor]]:
    """By layer: the gates' inputs (T, d) on a text (1, T) with the memory on, its neighbours, its confidences (T,)."""
    inputs, found, trust = {}, {}, {}

    def watch(layer: int, neighbors: Neighbors, confidence: Tensor) -> None:
        found[layer], trust[layer] = neighbors, confidence

    handles = [
        gate.module.register_forward_hook(
            lambda _, args, __, layer=gate.layer: inputs.update({layer: args[0].flatten(0, -2)})
        )
        for gate in find_gates(model)
    ]
    try:
        with watch_lookups(model, watch):
            model.base_model(input_ids=text, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, found, trust


@torch.no_grad()
def quality(model: nn.Module, memory: RoutingMemory, text: Tensor) -> dict:
    """
    What the engine finds of what there is, for the queries that the model makes on a text (1, T).

    Returns:
        `recall` by layer (a hit is a row no further off than the last of the exact neighbours, so that rows that are
        equally near may stand for each other), the mean `confidence`, and `nearest` and `last`: the median squared
        distance of the first and the last exact neighbour, in mean squared distances of two rows, over all layers.
    """
    inputs, found, trust = seen_by_gates(model, text)
    gates = {gate.layer: gate for gate in find_gates(model)}
    told: dict[str, list] = {"recall": [], "nearest": [], "last": []}
    for layer, rows in memory.layers.items():
        x, keys = inputs[layer], rows.to(inputs[layer].device).stored_keys
        query = rows.encoder.to(x.device).query(x, gate_logits(gates[layer], x).to(x.dtype))
        exact = TorchSearch(keys, memory.config).search(query, memory.config.num_neighbors)
        told["recall"].append(recall(query, keys, exact.rows, found[layer].rows))
        apart = 2 * keys.floats(slice(0, 2**16)).var(dim=0).sum()
        for name, column in (("nearest", 0), ("last", -1)):
            told[name].append((exact.distances[:, column].median() / apart).item())
    confidence = torch.stack([lam.float().cpu() for lam in trust.values()])
    return told | {"confidence": confidence.mean().item(), "open": (confidence > 0).float().mean().item()}


def recall(query: Tensor, keys: StoredKeys, exact: Tensor, found: Tensor) -> float:
    """The share of the rows (T, K) found that lie no further off than the last of the exact ones."""
    distances = [(keys.floats(rows) - query.float()[:, None]).square().sum(dim=-1) for rows in (exact, found)]
    return (distances[1] <= distances[0].amax(dim=-1, keepdim=True)).float().mean().item()
