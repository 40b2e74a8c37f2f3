"""What other code did to a cache between two forwards: found by comparing its tensors with those of the last forward.

Code may assign a layer's tensors itself: to evict tokens, to cut the cache, to choose rows. Lengths alone would not
tell which tokens are left, so the values of one layer are compared; not its keys, which may be rotated again.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import BaseQuantizedLayer, Cache, CacheLayerMixin

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Traced:
    """
    Where the slots of a changed cache were before.

    Attributes:
        rows: (B',) int64.
        slots: (B', slots) int64; -1 where it is not known.
    """

    rows: Tensor
    slots: Tensor

    @property
    def gaps(self) -> bool:
        return bool((self.slots < 0).any())

    def take(self, values: Tensor) -> Tensor:
        """(n, B', slots) of values (n, B, earlier slots): NaN where it is not known."""
        slots = self.slots.to(values.device)
        taken = values[:, self.rows.to(values.device)].gather(2, slots.clamp_min(0).expand(len(values), -1, -1))
        return taken.masked_fill(slots < 0, torch.nan)


@dataclass
class Snapshot:
    """
    The keys and values (B, H, L, D) of one layer of a cache, by reference, as they were after a forward.

    Attributes:
        layer: index of the layer: the last one with attention, whose values depend on all tokens before.
        version: counts changes in place; None if it is not known.
    """

    layer: int
    keys: Tensor
    values: Tensor
    version: int | None

    @classmethod
    def of(cls, cache: Cache) -> "Snapshot | Marks":
        """Marks for a cache whose layers do not hold plain tensors of all their tokens."""
        # all layers of a static cache have the same length, which may have to be fetched from a device
        past = None if cache.is_compileable else cache.get_seq_length()
        for index in reversed(_by_window(cache)):
            layer = cache.layers[index]
            if _is_plain(layer) and (past is None or layer.get_seq_length() == past > 0):
                return cls(index, layer.keys, layer.values, _version(layer.values))
        return Marks.of(cache)

    def __getstate__(self) -> dict:
        return vars(self) | {"version": None}  # copies of a tensor count anew

    def is_current(self, cache: Cache) -> bool:
        """Whether the layer still has these tensors, unchanged."""
        layer = cache.layers[self.layer] if self.layer < len(cache.layers) else None
        if layer is None or layer.values is not self.values:
            return False
        return not self._was_overwritten()

    def _was_overwritten(self) -> bool:
        """Whether the values, or a part of them, were changed in place; not known in inference mode."""
        return self.version is not None and self.version != _version(self.values)

    def holds_the_same(self, cache: Cache, length: int) -> bool:
        """Whether a cache holds the tokens that this one held, `length` of them."""
        layer = cache.layers[self.layer] if self.layer < len(cache.layers) else None
        if not _is_plain(layer) or self._was_overwritten():
            return False
        if int(cache.get_seq_length()) != length or int(layer.get_seq_length()) != length:
            return False
        values = layer.values
        return values.shape == self.values.shape and torch.equal(values, self.values.to(values.device, values.dtype))

    def beginnings_in(self, cache: Cache, length: int) -> Tensor | None:
        """
        Which rows of this cache, of `length` tokens, begin with all the tokens of the rows of another one.

        Returns:
            (B',) int64, -1 for rows of the other one that are not found; None if nothing can be compared.
        """
        layer = cache.layers[self.layer] if self.layer < len(cache.layers) else None
        if not _is_plain(layer) or self._was_overwritten() or self.values.shape[2] != length:
            return None
        values, earlier, past = layer.values, self.values.to(layer.values.device), int(cache.get_seq_length())
        if values.shape[2] != past or past > length:
            return None
        if (values.dtype, values.shape[1::2]) != (earlier.dtype, earlier.shape[1::2]):
            return None
        same = (_mixed(_codes(values))[:, None] == _mixed(_codes(earlier[:, :, :past]))).all(-1)
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def trace(self, cache: Cache, length: int, past: int) -> Traced | None:
        """
        Which tokens a changed cache holds.

        Args:
            length, past: slots of the cache when this snapshot was taken, and now.

        Returns:
            None if they cannot be told.
        """
        layer = cache.layers[self.layer] if self.layer < len(cache.layers) else None
        if layer is None or layer.values is self.values or self._was_overwritten():
            return None  # there is nothing to compare with
        if not _is_plain(layer) or int(layer.get_seq_length()) != past:
            return None
        values, earlier = layer.values, self.values.to(layer.values.device)
        if (values.dtype, values.shape[1::2]) != (earlier.dtype, earlier.shape[1::2]):
            return None
        if values.shape == earlier.shape and past == length:
            some = slice(-1, None) if cache.offloading else slice(None)  # its tensors move in every forward
            if torch.equal(values[:, :, some], earlier[:, :, some]):
                return Traced(torch.arange(len(values)), torch.arange(past).expand(len(values), -1))
        same_keys = torch.equal(layer.keys, self.keys.to(layer.keys.device)[: len(values), :, : values.shape[2]])
        found = _find(values, earlier, cut=same_keys) or _find(values, earlier, cut=not same_keys)
        if found is None:
            return None
        rows, columns = found
        columns = torch.where(columns < 0, -1, columns + (length - earlier.shape[2]))
        hidden = torch.arange(past - columns.shape[1], device=columns.device)  # slots that left a sliding window
        hidden = (hidden if past == length else torch.full_like(hidden, -1)).expand(len(rows), -1)
        return Traced(rows, torch.cat([hidden, columns], dim=1))


class Marks:
    """
    Which tensors a cache held after a forward whose tokens cannot be compared: quantised ones, or those of a cache
    with a storage of its own. As `Snapshot`, but what was changed cannot be traced.

    Attributes:
        tensors: with their versions; None if they are not known, as in copies and pickles.
    """

    def __init__(self, tensors: list[tuple[weakref.ref, int | None]]):
        self.tensors: list | None = tensors

    @classmethod
    def of(cls, cache: Cache) -> "Marks":
        return cls([(weakref.ref(one), _version(one)) for one in _tensors_in(vars(cache))])

    def __getstate__(self) -> dict:
        return {"tensors": None}

    def is_current(self, cache: Cache) -> bool:
        """As of `Snapshot`."""
        if self.tensors is None:
            return True
        found = list(_tensors_in(vars(cache)))
        if len(found) != len(self.tensors):
            return False
        return all(ref() is one and version == _version(one) for one, (ref, version) in zip(found, self.tensors))

    def holds_the_same(self, cache: Cache, length: int) -> bool:
        """As of `Snapshot`; not known here."""
        return False

    def beginnings_in(self, cache: Cache, length: int) -> None:
        """As of `Snapshot`; not known here."""
        return None

    def trace(self, cache: Cache, length: int, past: int) -> None:
        """As of `Snapshot`; not known here."""
        return None


def _tensors_in(held: object) -> Iterator[Tensor]:
    """The tensors that a cache holds in its attributes, in lists, in dictionaries and in its layers."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, CacheLayerMixin):
        yield from _tensors_in(vars(held))
    elif isinstance(held, (list, tuple, dict)):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors_in(part)


def _find(values: Tensor, earlier: Tensor, cut: bool) -> tuple[Tensor, Tensor] | None:
    """
    For values (B', H, L', D), which rows (B',) of the earlier (B, H, L, D) they are from, and which columns (B', L').

    Args:
        cut: whether they are the first columns of those rows. Else they are any columns in any order, -1 for those
            that differ from head to head, but for the last one: new tokens go on from the latest of which anything is
            left.
    """
    mine, theirs = _codes(values), _codes(earlier)
    mixed, earlier_mixed = _mixed(mine), _mixed(theirs)  # (B', L'), (B, L)
    width = mixed.shape[1]
    if width > earlier_mixed.shape[1]:
        return None
    rows, columns = [], []
    for row, codes in enumerate(mixed):
        if cut:
            matches = (earlier_mixed[:, :width] == codes).all(dim=1)
        else:
            present = [all(torch.isin(*pair).all() for pair in zip(mine[row], other)) for other in theirs]
            matches = torch.tensor(present, device=values.device)
        if not matches.any():
            return None
        source = row if row < len(matches) and matches[row] else int(matches.nonzero()[0])
        rows.append(source)
        if cut:
            columns.append(torch.arange(width, device=values.device))
            continue
        places = _places(codes, earlier_mixed[source])
        places[-1] = max(int(_places(*pair).max()) for pair in zip(mine[row], theirs[source]))
        columns.append(places)
    return torch.tensor(rows, device=values.device), torch.stack(columns)


def _places(codes: Tensor, among: Tensor) -> Tensor:
    """Where each code is among others, the last place if there are several; -1 for those that are not there."""
    ordered, order = among.sort(stable=True)
    found = torch.searchsorted(ordered, codes, right=True) - 1
    places = order[found.clamp_min(0)]
    return torch.where((found >= 0) & (among[places] == codes), places, -1)


def _codes(values: Tensor) -> Tensor:
    """(B, H, L) int64, equal where all D components are, and hardly ever else."""
    bits = values.detach().contiguous().view(_BITS[values.element_size()]).long()
    return (bits * _weights(bits.shape[-1]).to(bits.device)).sum(-1)


def _mixed(codes: Tensor) -> Tensor:
    """(B, L) int64, equal where the codes (B, H, L) of all heads are."""
    return (codes * _weights(codes.shape[1]).to(codes.device)[:, None]).sum(1)


def _weights(count: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))


def _by_window(cache: Cache) -> list[int]:
    """Indices of a cache's layers with attention: those with a sliding window first."""
    layers = [index for index, layer in enumerate(getattr(cache, "layers", [])) if isinstance(layer, CacheLayerMixin)]
    return sorted(layers, key=lambda index: not getattr(cache.layers[index], "is_sliding", False))


def _is_plain(layer: CacheLayerMixin | None) -> bool:
    if layer is None or isinstance(layer, BaseQuantizedLayer) or not isinstance(layer.values, Tensor):
        return False
    return layer.values.dim() == 4


def _version(values: Tensor) -> int | None:
    return None if values.is_inference() else values._version
