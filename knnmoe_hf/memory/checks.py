"""What a user's own rows must be before they become a memory."""

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.memory.storage import all_finite


def check_rows(config: KNNMoEConfig, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], gates: Mapping) -> int:
    """
    Checks keys `{layer: (N, d)}` and values `{layer: (N, E)}` against the model's gates `{layer: Gate}`.

    Returns:
        N.

    Raises:
        ValueError: naming the layer and what is wrong with its tensors.
    """
    if not keys or set(keys) != set(values):
        raise ValueError(f"keys are for layers {shown(list(keys))}, values for {shown(list(values))}: give both.")
    first = next(iter(keys.values()))
    rows = len(first) if isinstance(first, Tensor) and first.dim() else 0
    for layer in keys:
        if layer not in gates:
            raise ValueError(f"layer {shown(layer)} has no gate in this model: choose among {shown(sorted(gates))}.")
        gate = gates[layer]
        for name, tensor, width in (
            ("keys", keys[layer], gate.hidden_size),
            ("values", values[layer], gate.num_experts),
        ):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name}[{layer}] are a {type(tensor).__name__}: give a tensor.")
            if tuple(tensor.shape) != (rows, width) or not tensor.is_floating_point():
                raise ValueError(
                    f"{name}[{layer}] are {list(tensor.shape)} {tensor.dtype}: floats of {[rows, width]} are needed."
                )
            if not all_finite(tensor):
                raise ValueError(f"{name}[{layer}] have values that are not finite: drop those rows.")
        if config.value_space == "assignment" and bool((values[layer] < 0).any()):
            raise ValueError(
                f"values[{layer}] are negative: value_space='assignment' takes expert weights, not logits."
            )
    return rows


def check_ids(example_ids: Iterable[int] | Tensor | None, rows: int) -> Tensor:
    """
    The example of each row, (N,) int64; each row its own if None.

    Raises:
        ValueError: for other than one integer per row.
    """
    if example_ids is None:
        return torch.arange(rows)
    ids = example_ids.tolist() if isinstance(example_ids, Tensor) else list(example_ids)
    if wrong := [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool)]:
        raise ValueError(f"{shown(wrong[0])} is no example id: give integers.")
    if len(ids) != rows:
        raise ValueError(f"{len(ids)} example_ids are given for {rows} rows: give one for each, or None.")
    return torch.tensor(ids, dtype=torch.int64)
