"""Hostile rows: kinds of poison, each for some rows of each layer of a memory."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from knnmoe_hf import RoutingMemory
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.values import store_values

Poison = Callable[[LayerRows, Tensor, torch.Generator], LayerRows]


def with_keys(rows: LayerRows, places: Tensor, keys: Tensor) -> LayerRows:
    codes, step = rows.key_codes.clone(), rows.encoder.step
    codes[places] = (keys if step is None else (keys / step).round().clamp(-127, 127)).to(codes.dtype)
    return replace(rows, key_codes=codes)


def with_values(rows: LayerRows, places: Tensor, values: Tensor, space: str = "logits") -> LayerRows:
    table, stored = rows.decoded_values.clone(), rows.values
    table[places] = values
    experts = None if stored.experts is None else stored.codes.shape[1]
    return replace(rows, values=store_values(table, space, stored.codes.dtype, experts))


def at_the_centre(noise: float) -> Poison:
    def poison(rows, places, generator):
        keys = rows.decoded_keys
        drawn = torch.randn(len(places), keys.shape[1], generator=generator)
        return with_keys(rows, places, keys.mean(dim=0) + noise * keys.std(dim=0) * drawn)

    return poison


def one_expert(high: float, low: float, noise: float = 0.0) -> Poison:
    def poison(rows, places, generator):
        values = torch.full((len(places), rows.num_experts), low)
        values[:, 3] = high
        return with_values(rows, places, values + noise * torch.randn(values.shape, generator=generator))

    return poison


def changed(change: Callable[[Tensor], Tensor]) -> Poison:
    return lambda rows, places, _: with_values(rows, places, change(rows.decoded_values[places]))


def both(one: Poison, other: Poison) -> Poison:
    return lambda rows, places, generator: other(one(rows, places, generator), places, generator)


def _raised(values: Tensor, by: float) -> Tensor:
    return values + by * F.one_hot(torch.tensor(3), values.shape[1])


KINDS: dict[str, Poison] = {
    "keys at the centre, one expert": both(at_the_centre(0.0), one_expert(10.0, -10.0)),
    "keys at the centre": at_the_centre(0.0),
    "keys near the centre": at_the_centre(0.1),
    "keys around the centre": at_the_centre(0.3),
    "keys of zero": lambda rows, places, _: with_keys(rows, places, torch.zeros(rows.key_codes.shape[1])),
    "one expert": one_expert(10.0, -10.0),
    "one expert, with noise": one_expert(10.0, -10.0, 0.5),
    "one expert far above the others": changed(lambda values: _raised(values, 20.0)),
    "values ten times as large": changed(lambda values: 10 * values),
}
"""Each is found in a single row, in 1 % and in 10 % of the rows."""

MANY: dict[str, Poison] = {
    "one expert a little above the others": changed(lambda values: _raised(values, 6.0)),
    "the contrary of the values": changed(torch.neg),
    "no preference": changed(torch.zeros_like),
}
"""Each is found in 10 % of the rows."""


def poisoned(memory: RoutingMemory, poison: Poison, share: float, seed: int = 5) -> tuple[RoutingMemory, Tensor]:
    """The memory with this share of its rows, one at least, poisoned in each layer; and these rows, (N,) bool."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(memory), generator=generator)[: max(1, round(share * len(memory)))]
    layers = {layer: poison(rows, places, generator) for layer, rows in memory.layers.items()}
    return replace(memory, layers=layers), torch.zeros(len(memory), dtype=torch.bool).index_fill(0, places, True)
