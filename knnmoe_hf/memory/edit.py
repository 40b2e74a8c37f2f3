"""
Memories from memories: some of the rows, the rows of two, the same rows stored otherwise.

Each function makes a new memory and changes nothing of the ones that it is given. They are methods of `RoutingMemory`.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from knnmoe_hf.errors import MemoryMismatchError, counted, shown
from knnmoe_hf.lookup.codecs import KeyEncoder
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.values import joined_values
from knnmoe_hf.memory.base_model import BaseModel
from knnmoe_hf.memory.data import Memory, MemoryData
from knnmoe_hf.memory.fingerprint import same_gates
from knnmoe_hf.memory.history import changes, noted
from knnmoe_hf.memory.next_tokens import next_tokens_of
from knnmoe_hf.memory.provenance import Provenance

logger = logging.getLogger(__name__)


# some of the rows


def remove_examples(memory: Memory, example_ids: Iterable[int]) -> Memory:
    """
    A memory without the rows of these examples, its scales fitted anew.

    Raises:
        ValueError: if provenance was left out, or an id has no row.
    """
    if memory.provenance is None:
        raise ValueError(
            "this memory was saved without provenance, so its examples are unknown: build it anew, and save it with "
            "provenance='text' or 'ids'."
        )
    unwanted, present = set(map(int, example_ids)), set(memory.provenance.example_ids.tolist())
    if missing := sorted(unwanted - present):
        raise ValueError(f"{shown(missing)} are not examples of this memory: its ids are {shown(sorted(present))}.")
    left = _select(memory, ~_is_in(memory.provenance, unwanted))
    rows = f"{len(memory) - len(left):,} of {counted(len(memory), 'row')}"
    return noted(left, f"{len(unwanted):,} of {counted(len(present), 'example')} were removed, with {rows}")


def select_rows(memory: Memory, max_rows: int | None = None, min_gain: float | None = None) -> Memory:
    """
    A memory of the rows whose target's NLL fell most when their routing was optimised, its scales fitted anew.

    Args:
        max_rows: keep at most so many, those of the largest gains.
        min_gain: keep rows whose target's NLL fell by at least so many nats.

    Raises:
        ValueError: if the rows' gains are not recorded.
    """
    known = memory.provenance
    if known is None or not bool(known.nll_before.any()):
        raise ValueError(
            "the gains of this memory's rows are not recorded: build it anew, and save it with provenance='text'."
        )
    gain = known.nll_before - known.nll_after
    keep = torch.ones(len(gain), dtype=torch.bool) if min_gain is None else gain >= min_gain
    if max_rows is not None and int(keep.sum()) > max_rows:
        best = gain.masked_fill(~keep, float("-inf")).argsort(descending=True, stable=True)[:max_rows]
        keep = torch.zeros_like(keep).index_fill(0, best, True)
    return noted(_select(memory, keep), f"rows that gained most: {_of_rows(memory, keep)}")


def take(memory: Memory, keep: Tensor) -> Memory:
    """The rows where `keep` (N,) bool is true; unlike in the other edits, distances and scales stay those of all."""
    rows = _as_slice(keep)
    taken = replace(
        memory,
        origin=replace(memory.origin, reference_set_hash=None),
        layers={layer: stored.select(rows) for layer, stored in memory.layers.items()},
        provenance=memory.provenance.select(keep) if memory.provenance is not None else None,
        stored_next_tokens=_kept(memory.stored_next_tokens, keep),
        verdict=None,
    )
    return noted(taken, f"rows that were chosen by hand: {_of_rows(memory, keep)}")


def _of_rows(memory: MemoryData, keep: Tensor) -> str:
    return f"{int(keep.sum()):,} of {counted(len(memory), 'row')} were kept"


def _as_slice(keep: Tensor) -> Tensor | slice:
    """A mask (N,) of consecutive rows as a slice, which copies no tensor; any other mask as it is."""
    first, count = int(keep.int().argmax()) if len(keep) else 0, int(keep.sum())
    return slice(first, first + count) if bool(keep[first : first + count].all()) else keep


def _select(memory: Memory, keep: Tensor) -> Memory:
    provenance = memory.provenance.select(keep) if memory.provenance is not None else None
    layers = {layer: rows.select(keep) for layer, rows in memory.layers.items()}
    return _with_rows(memory, layers, provenance, _kept(memory.stored_next_tokens, keep))


def _kept(column: Tensor | None, keep: Tensor) -> Tensor | None:
    return column[keep] if column is not None else None


def _with_rows(
    memory: Memory, layers: dict[int, LayerRows], provenance: Provenance | None, next_tokens: Tensor | None
) -> Memory:
    """The memory with other rows, their distances measured anew; `next_tokens` (N,) are stored, None if none are."""
    rows, options = len(next(iter(layers.values())).key_codes), memory.config.retrieval_options()
    ids = provenance.example_ids if provenance is not None else torch.arange(rows)
    return replace(
        memory,
        origin=replace(memory.origin, reference_set_hash=None),
        provenance=provenance,
        stored_next_tokens=next_tokens,
        layers={layer: rows.measured(ids, options) for layer, rows in layers.items()},
        verdict=None,  # it was measured with the rows that were there
    )


def _is_in(provenance: Provenance, examples: set[int]) -> Tensor:
    return torch.isin(provenance.example_ids, torch.tensor(sorted(examples), dtype=torch.int64))


# the rows of two memories


def merge(memory: Memory, other: Memory) -> Memory:
    """
    A memory with the rows of both, its scales fitted anew; without provenance they are the mean of the two.

    Rows of the other memory are stored by this one's codecs, which were not fitted to them. An example that both hold
    under one id with the same tokens (with the same hashes, where one of them has no text) is taken once; a different
    example under an id that is taken gets the next free one. If rows of a memory that has example ids without text are
    among them, the result has no text either, which a warning says. The next tokens of the rows are kept, as a tensor
    where there is no text to read them from, if both memories have them; if one has none, so has the result, which is
    logged. The calibration is dropped, and so is what the memories say of themselves and do not agree on: the record
    of a benchmark, a licence, a title.

    Raises:
        MemoryMismatchError: if value spaces, ways of storage, layers, base models or provenance differ in kind.
    """
    _check_mergeable(memory, other)
    merged, sizes = _merged(memory, other), f"{counted(len(memory), 'row')} and {len(other):,} of another memory"
    return noted(merged, f"two memories were merged: {sizes}, which gave {len(merged):,}")


def _merged(memory: Memory, other: Memory) -> Memory:
    task = memory.task_record if memory.task_record == other.task_record else None
    memory = replace(memory, task_record=task, card_data=memory.card_data.merged(other.card_data))
    provenance = memory.provenance
    if provenance is not None:
        any_text = provenance.has_text or other.provenance.has_text
        other = _without_shared_examples(other, provenance)
        provenance = provenance.joined(other.provenance)
        if any_text and not provenance.has_text:
            logger.warning(
                "merging: one of the memories has no text of its references, so the merged one keeps ids alone"
            )
    layers = {layer: _joined(rows, other.layers[layer]) for layer, rows in memory.layers.items()}
    next_tokens = _joined_next_tokens(memory, other, provenance)
    if provenance is not None:
        return replace(_with_rows(memory, layers, provenance, next_tokens), calibration=None)
    # which rows share an example is unknown, so the distances between examples cannot be measured anew
    layers = {
        layer: replace(rows, distances=_stacked(memory, other, layer), scale=_mean_scale(memory, other, layer))
        for layer, rows in layers.items()
    }
    origin = replace(memory.origin, reference_set_hash=None)
    return replace(
        memory, layers=layers, origin=origin, stored_next_tokens=next_tokens, calibration=None, verdict=None
    )


def _joined_next_tokens(memory: MemoryData, other: MemoryData, provenance: Provenance | None) -> Tensor | None:
    """The next tokens of both that are to be stored: None if `provenance` has them, or one memory has none."""
    sides = [memory.next_tokens, other.next_tokens]
    if any(side is None for side in sides):
        if any(side is not None and len(side) for side in sides):
            level = logging.INFO if memory.config.recall == "routing" else logging.WARNING
            logger.log(
                level,
                "merging: one of the memories has no next tokens, so the merged one works with recall='routing' alone",
            )
        return None
    joined = torch.cat(sides)
    return joined if next_tokens_of(len(joined), provenance, None) is None else None


def _stacked(memory: MemoryData, other: MemoryData, layer: int) -> Tensor:
    """Distances of both, to as many neighbours as there are in either."""
    sides = [memory.layers[layer].distances, other.layers[layer].distances]
    sides = [side for side in sides if len(side)] or sides[:1]
    width = min(side.shape[1] for side in sides)
    return torch.cat([side[:, :width] for side in sides])


def _mean_scale(memory: MemoryData, other: MemoryData, layer: int) -> float:
    rows = len(memory) + len(other)
    total = memory.layers[layer].scale * len(memory) + other.layers[layer].scale * len(other)
    return total / rows if rows else memory.layers[layer].scale


def _joined(mine: LayerRows, theirs: LayerRows) -> LayerRows:
    """The rows of both in the encoding of the first."""
    codes = theirs.key_codes
    if not _same_tensors(mine.encoder, theirs.encoder):
        inputs = theirs.encoder.inputs(codes)
        codes = mine.encoder.encode(inputs, inputs, codes.dtype)
    stored = joined_values(mine.values, theirs.values)
    return replace(mine, key_codes=torch.cat([mine.key_codes, codes]), values=stored, stats=None, source=None)


def _same_tensors(one: KeyEncoder, other: KeyEncoder) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def _check_mergeable(memory: MemoryData, other: MemoryData) -> None:
    for name, mine in memory.origin.options.items():
        theirs = other.origin.options[name]
        if mine != theirs:
            raise MemoryMismatchError(f"memories of {name} {mine!r} and {theirs!r} do not merge: build both alike.")
    if list(memory.layers) != list(other.layers):
        described = f"{shown(list(memory.layers))} and {shown(list(other.layers))}"
        raise MemoryMismatchError(f"memories of layers {described} do not merge: build both for the same layers.")
    if (memory.provenance is None) != (other.provenance is None):
        raise MemoryMismatchError(
            "one of the memories has no provenance: merge such as both have it or neither, where "
            "save_pretrained(..., provenance='none') leaves it out."
        )
    prints = [side.origin.base_model_fingerprint for side in (memory, other)]
    if None not in prints and not same_gates(*map(dict, prints)):
        raise MemoryMismatchError("the memories were built for different models: merge such as belong to one model.")


def _without_shared_examples(other: Memory, mine: Provenance) -> Memory:
    """`other` without the examples that both hold, and with free ids for those whose id is taken."""
    sides = [mine, other.provenance]
    known = [side.tokens() for side in sides]
    if any(side.hashes() for side in sides):
        known = [side.without_text().hashes() for side in sides]
    my_texts, their_texts = known
    taken, theirs = set(mine.example_ids.tolist()), set(other.provenance.example_ids.tolist())
    both = taken & theirs & set(my_texts) & set(their_texts)
    # an example of a few tokens has no hashes, by which it could be recognised
    shared = {id for id in both if len(my_texts[id]) and torch.equal(my_texts[id], their_texts[id])}
    clashes = sorted((taken & theirs) - shared)
    free = max(taken | theirs, default=-1) + 1
    new_ids = {old: free + step for step, old in enumerate(clashes)}
    if new_ids:
        logger.info("merging: %d examples of the other memory get new ids, from %d on", len(new_ids), free)
    kept = _select(other, ~_is_in(other.provenance, shared)) if shared else other
    return replace(kept, provenance=kept.provenance.renumbered(new_ids))


# the same rows, stored otherwise


def recoded(memory: Memory, base_model: nn.Module, **options) -> Memory:
    """
    The same rows, stored with other options of `KNNMoEConfig` (`key_codec`, `key_dtype`, `value_dtype`, ...).

    Rows are decoded and encoded again, so what the present storage has lost stays lost: begin with a memory of
    `key_codec="raw"`, `key_dtype="float32"`, `value_dtype="float32"`. Other keys have other similarities, so the
    calibration is dropped: `knnmoe_hf.calibrate` makes another.

    Args:
        base_model: the model that the memory was built for.
        options: in place of the memory's own.

    Raises:
        MemoryMismatchError: for another model.
        ValueError: for a value space other than the memory's, or a key codec that needs the gates' inputs where the
            memory keeps their logits.
    """
    config = type(memory.config).from_dict(memory.config.saved() | options)
    built = memory.origin.options
    if config.value_space != built["value_space"]:
        raise ValueError(
            f"value_space={shown(config.value_space)} cannot be made of {built['value_space']!r} values: build the "
            "memory anew."
        )
    if built["key_codec"] == "logits" != config.key_codec:
        raise ValueError(f"key_codec={shown(config.key_codec)} cannot be made of logits: build the memory anew.")
    memory.check_model(base_model)
    base, stored_as = BaseModel(base_model), config.retrieval_options()
    ids = memory.provenance.example_ids if memory.provenance is not None else torch.arange(len(memory))
    layers = {}
    for layer, rows in memory.layers.items():
        x = rows.encoder.inputs(rows.key_codes)
        logits = x if rows.encoder.of_logits else base.logits(layer, x)
        stored = LayerRows.encoded(x, logits, rows.values, ids, stored_as, router=base.router(layer))
        layers[layer] = replace(stored, hidden_size=rows.hidden_size)
    origin = replace(memory.origin, options={name: getattr(config, name) for name in built})
    stored = replace(memory, config=config, layers=layers, origin=origin, calibration=None, verdict=None)
    return noted(stored, f"rows were stored anew: {', '.join(changes(memory.config, config)) or 'as before'}")
