"""Prepared examples into padded batches of token ids, and where a batch's targets are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not a target


def collate(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """
    Pads rows of `prepare_dataset` on the right to one batch, with token id 0; `attention_mask` says what is padding.

    Returns:
        `input_ids`, `labels`, `attention_mask` (B, S) int64 and `example_id` (B,) int64.
    """
    length = max(
        1, *(len(row["input_ids"]) for row in rows)
    )  # at least 1, so that the model can run on a batch of empty texts

    def padded(name: str, filler: int) -> Tensor:
        filled = [as_list(row[name]) + [filler] * (length - len(row[name])) for row in rows]
        return torch.tensor(filled, dtype=torch.int64)

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    batch["attention_mask"] = padded("attention_mask", 0)
    return batch | {"example_id": torch.tensor([row["example_id"] for row in rows])}


def empty_batch() -> dict[str, Tensor]:
    """A batch without rows, with the same tensors as from `collate`."""
    return {name: torch.zeros(0, 0, dtype=torch.int64) for name in ("input_ids", "labels", "attention_mask")} | {
        "example_id": torch.zeros(0, dtype=torch.int64)
    }


def batches(rows: Sequence[Mapping[str, Any]], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows in their order (the last may be smaller), collated and moved to a device."""
    for start in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def target_mask(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which tokens predict a target, (B, S) bool: the next label is not -100, and neither token is padding."""
    targets = torch.zeros_like(labels, dtype=torch.bool)
    targets[:, :-1] = labels[:, 1:] != IGNORED
    if attention_mask is not None:
        real = attention_mask.bool()
        targets &= real
        targets[:, :-1] &= real[:, 1:]
    return targets


def as_list(values) -> list[int]:
    """A tensor, an array or a sequence as a list."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
