"""Timing a model with and without its memories in turns, and its lookups while it runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.speed.measuring import median, synchronize, timed
from benchmarks.speed.synthetic import router_inputs
from knnmoe_hf import attach_override, detach_memory, disable_memory, get_memory, set_memory
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.models.attach import watch_lookups
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.search import StoredKeys, build_engine

BASE = "base"
STEPS = ("encode", "search", "combine", "mix")
Rounds = dict[str, list[list[float]]]
"""Seconds of single forwards, `{side: [round][forward]}`; a side is `BASE` or the name of an attached memory."""


@contextmanager
def running(model: nn.Module, side: str) -> Iterator[None]:
    """A context in which the model runs without a memory, or with the attached memory of this name."""
    if side == BASE:
        with disable_memory(model):
            yield
    else:
        set_memory(model, side)
        yield


def forward_of(model: nn.Module, keep: int | None) -> Callable:
    """The decoder without the output head for None, else the whole model with logits of the last `keep`, 0 for all."""
    return model.base_model if keep is None else partial(model, logits_to_keep=keep)


@torch.no_grad()
def decoding(
    model: nn.Module, sides: list[str], prompt: Tensor, text: Tensor, rounds: int, keep: int | None = None
) -> Rounds:
    """
    Seconds of each decoding step, the same tokens for all sides, which take turns at each token.

    Args:
        model: with the memories attached.
        sides: `BASE` and names of memories.
        prompt: (1, P) tokens; every side fills a cache with them.
        text: (rounds + 1, steps) tokens that follow.
        rounds: timed ones; one more warms up.
        keep: see `forward_of`.
    """
    caches, forward = {}, forward_of(model, keep)
    for side in sides:  # each its own: a memory refuses a cache that was filled without it
        caches[side] = DynamicCache(config=model.config)
        with running(model, side):
            forward(input_ids=prompt, past_key_values=caches[side])
    found: Rounds = {side: [[] for _ in range(rounds)] for side in sides}
    for turn in range(-1, rounds):
        for place, token in enumerate(text[turn + 1].view(-1, 1, 1)):
            for side in sides if (turn + place) % 2 else sides[::-1]:
                run = partial(forward, input_ids=token, past_key_values=caches[side])
                with running(model, side):
                    seconds = timed(run, model.device)
                if turn >= 0:
                    found[side][turn].append(seconds)
    return found


@torch.no_grad()
def prefilling(model: nn.Module, sides: list[str], text: Tensor, rounds: int, keep: int | None = None) -> Rounds:
    """Seconds of filling a cache with each text of (rounds + 1, S), twice a round: first to last, last to first."""
    found: Rounds = {side: [[] for _ in range(rounds)] for side in sides}
    for turn in range(-1, rounds):
        for side in (*sides, *sides[::-1]):
            run = partial(forward_of(model, keep), input_ids=text[turn + 1][None], use_cache=True)
            with running(model, side):
                seconds = timed(run, model.device)
            if turn >= 0:
                found[side][turn].append(seconds)
    return found


class TimedLookup:
    """
    A `RoutingOverride` that calls a memory's lookup and keeps the seconds of the call and of each of its `STEPS`.

    `mix` includes the model's routing rule. Only the confidence is in none of them.
    """

    def __init__(self, lookup: Callable, device: torch.device):
        self.lookup, self.device = lookup, device
        self.seconds: dict[str, list[float]] = {name: [] for name in ("whole", *STEPS)}
        self._call = self._timed("whole", lookup)

    def __call__(self, x: Tensor, output: tuple, tokens) -> tuple | None:
        own = {name: getattr(self.lookup, name) for name in STEPS}
        for name, step in own.items():
            setattr(self.lookup, name, self._timed(name, step))
        try:
            return self._call(x, output, tokens)
        finally:
            for name in own:
                delattr(self.lookup, name)

    def _timed(self, name: str, run: Callable) -> Callable:
        def call(*args, **kwargs):
            synchronize(self.device)
            started = time.perf_counter()
            found = run(*args, **kwargs)
            synchronize(self.device)
            self.seconds[name].append(time.perf_counter() - started)
            return found

        return call


def lookups_of(model: nn.Module, name: str) -> dict:
    """The lookups of an attached memory, by layer."""
    return RoutingHooks.of(model).named[name]


@contextmanager
def timed_lookups(model: nn.Module, name: str) -> Iterator[Callable[[], dict[str, list[float]]]]:
    """Inside, the memory of this name runs; the yielded function returns the seconds since its last call, by step."""
    timers = {layer: TimedLookup(lookup, model.device) for layer, lookup in lookups_of(model, name).items()}

    def take() -> dict[str, list[float]]:
        found = {step: [] for step in ("whole", *STEPS)}
        for timer in timers.values():
            for step, seconds in timer.seconds.items():
                found[step] += seconds
                seconds.clear()
        return found

    attach_override(model, timers, "timed lookups")
    try:
        yield take
    finally:
        detach_memory(model, "timed lookups")


@torch.no_grad()
def lookups_within(model: nn.Module, name: str, prompt: Tensor, text: Tensor) -> dict[str, dict[str, float]]:
    """Median microseconds of a lookup by step: in the prefill of a prompt (1, P), and in decoding (S,) after it."""
    cache, found = DynamicCache(config=model.config), {}
    with timed_lookups(model, name) as take:
        model.base_model(input_ids=prompt, past_key_values=cache)
        found["prefill"] = take()
        for token in text.view(-1, 1, 1):
            model.base_model(input_ids=token, past_key_values=cache)
        found["decode"] = take()
    return {kind: {s: 1e6 * median(times) for s, times in steps.items() if times} for kind, steps in found.items()}


def lookups_in_turns(model: nn.Module, names: list[str], prompt: Tensor, text: Tensor, rounds: int) -> dict[str, list]:
    """`lookups_within` of each memory, round by round in turns, `{name: [round]}`; `text` is (rounds + 1, S)."""
    found: dict[str, list] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the first warms up
        for name in names if turn % 2 else names[::-1]:
            one = lookups_within(model, name, prompt, text[turn + 1])
            if turn >= 0:
                found[name].append(one)
    return found


@torch.no_grad()
def quality(model: nn.Module, name: str, text: Tensor) -> dict:
    """
    How many of the nearest rows the engine finds, for the queries that the model makes on a text (1, T): of those that
    route, and in the layer whose neighbours vote for the next token of all that vote.

    Returns:
        `recall` by layer, the mean `confidence`, and for each layer `nearest` and `last`: the median squared distance
        of the first and the last exact neighbour, in units of the mean squared distance of two rows.
    """
    events, found = {}, {"recall": [], "nearest": [], "last": []}
    set_memory(model, name)
    with watch_lookups(model, lambda event: events.update({event.layer: event})):
        inputs = router_inputs(model, text)
    memory = get_memory(model, name)
    for layer, rows in memory.layers.items():
        x, logits, device = inputs[layer], events[layer].own[0], model.device
        keys = rows.to(device).stored_keys
        query = rows.encoder.to(device).query(x, logits)
        rows_found = (events[layer].voters or events[layer].neighbors).rows
        exact = build_engine(keys, RetrievalOptions(search_backend="torch")).search(query, rows_found.shape[1])
        found["recall"].append(recall(query, keys, exact.rows, rows_found))
        apart = 2 * keys.floats(slice(0, 2**16)).var(dim=0).sum()
        for column, place in ((0, "nearest"), (memory.config.num_neighbors - 1, "last")):
            found[place].append((exact.distances[:, column].median() / apart).item())
    confidence = torch.stack([event.confidence.float().cpu() for event in events.values()])
    return found | {"confidence": confidence.mean().item()}


def recall(query: Tensor, keys: StoredKeys, exact: Tensor, found: Tensor) -> float:
    """Share of the rows `found` (T, K) that are no further off than the last of the `exact` (T, K); ties count."""
    distances = [(keys.floats(rows) - query.float()[:, None]).square().sum(dim=-1) for rows in (exact, found)]
    return (distances[1] <= distances[0].amax(dim=-1, keepdim=True)).float().mean().item()
