"""A memory's layers from a build's rows: checked, encoded block by block, by one process or several together."""

import copy
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.blocks import Allocate, Table, all_finite, blocks, outside
from knnmoe_hf.lookup.layer import LayerRows, bounds
from knnmoe_hf.lookup.options import FIXED_AT_BUILD, RetrievalOptions
from knnmoe_hf.memory.base_model import BaseModel, Gate
from knnmoe_hf.memory.manifest import Origin

if TYPE_CHECKING:  # a class of transformers, which takes seconds to import
    from knnmoe_hf.config import KNNMoEConfig


def check_rows(
    value_space: str, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], gates: Mapping[int, Gate]
) -> int:
    """
    Checks a user's keys `{layer: (N, d)}` and values `{layer: (N, E)}` against the model's gates.

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
        _check_tensor(f"keys[{layer}]", keys[layer], (rows, gates[layer].hidden_size))
        _check_tensor(f"values[{layer}]", values[layer], (rows, gates[layer].num_experts))
        if value_space == "assignment" and bool((values[layer] < 0).any()):
            raise ValueError(
                f"values[{layer}] are negative: value_space='assignment' takes expert weights, not logits."
            )
    return rows


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} are a {type(tensor).__name__}: give a tensor.")
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name} are {list(tensor.shape)} {tensor.dtype}: floats of {list(shape)} are needed.")
    if not all_finite(tensor):
        raise ValueError(f"{name} have values that are not finite: drop those rows.")


def check_ids(example_ids: Iterable[int] | Tensor | None, rows: int) -> Tensor:
    """
    The example of each row, (N,) int64; each row is its own example if None.

    Raises:
        ValueError: for other than one integer per row.
    """
    if example_ids is None:
        return torch.arange(rows)
    ids = example_ids.tolist() if isinstance(example_ids, Tensor) else list(example_ids)
    if wrong := [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool)]:
        raise ValueError(f"{shown(wrong[0])} is not an example id: give integers.")
    if len(ids) != rows:
        raise ValueError(f"{len(ids)} example_ids are given for {rows} rows: give one for each, or None.")
    return torch.tensor(ids, dtype=torch.int64)


def encode_layers(
    options: RetrievalOptions,
    keys: Mapping[int, Table],
    values: Mapping[int, Table],
    base: BaseModel,
    example_ids: Tensor,
    processes: Processes,
    allocate: Allocate,
) -> dict[int, LayerRows]:
    """
    Rows as a memory stores them; of each layer only a block of rows is in memory at once.

    Args:
        options: how the rows are stored.
        keys: `{layer: (N, d)}`, gate inputs, of the layers that this process encodes, any float dtype.
        values: `{layer: (N, E)}`, of the same layers.
        base: the model that the rows belong to.
        example_ids: (N,) int64.
        processes: each encodes other layers, and all of them get all layers.
        allocate: makes the tensors of N rows.

    Raises:
        ValueError: in every process, if rows are not finite in the dtypes that the options ask for.
    """
    own, failure = {}, None
    try:
        for layer, x in keys.items():
            logits = base.logits(layer, x)
            own[layer] = LayerRows.encoded(
                x, logits, values[layer], example_ids, options, allocate, base.router(layer)
            )
            _check_finite(own[layer], layer, x, values[layer], options)
    except ValueError as error:
        failure = str(error)
    if said := [text for text in processes.gather(failure) if text is not None]:
        raise ValueError(said[0])
    return _shared(own, processes, allocate)


def _check_finite(rows: LayerRows, layer: int, x: Table, values: Table, options: RetrievalOptions) -> None:
    if all(map(all_finite, rows.tensors().values())):
        return _check_bounds(rows, layer, options)
    for name, source in ((f"keys[{layer}]", x), (f"values[{layer}]", values)):
        if wrong := [found for block in blocks(source) if (found := outside(block)) is not None]:
            raise ValueError(f"{name} have {wrong[0]}: drop those rows.")
    raise ValueError(_overflow(rows, layer, options))


def _check_bounds(rows: LayerRows, layer: int, options: RetrievalOptions) -> None:
    """What could be saved, but not opened again."""
    known = bounds(rows.num_experts, {name: getattr(options, name) for name in FIXED_AT_BUILD})
    for name, tensor in rows.tensors().items():
        if (wrong := outside(tensor, known.get(name))) is not None:
            kind = "values" if name.startswith("values") else "keys"
            raise ValueError(
                f"{kind}[{layer}] are too large (as stored, their {name} has {wrong}): drop the largest rows."
            )


def _overflow(rows: LayerRows, layer: int, options: RetrievalOptions) -> str:
    """Which stored tensor cannot hold a layer's finite rows, and the way out."""
    default, values = rows.values.default_value, (rows.values.codes, rows.values.step, rows.values.offset)
    if default is not None and not all_finite(default):  # then the codes, which are relative to it, overflow too
        return (
            f"values[{layer}] are too large for the float16 default value of the experts that are not stored: use "
            "value_experts=None to store all experts."
        )
    if not all(all_finite(tensor) for tensor in values if tensor is not None):
        return f"values[{layer}] overflow value_dtype={options.value_dtype!r}: use value_dtype='float32'."
    if not all_finite(rows.key_codes) and options.key_dtype == "float16":
        return f"keys[{layer}] overflow key_dtype='float16': use key_dtype='bfloat16' or 'float32'."
    return f"keys[{layer}] are so large that their {options.key_codec!r} codec overflows: drop the largest rows."


def _shared(own: Mapping[int, LayerRows], processes: Processes, allocate: Allocate) -> dict[int, LayerRows]:
    """The layers of all processes, in each of them."""
    described, shared = processes.gather({layer: _description(rows) for layer, rows in own.items()}), {}
    owners = {layer: process for process, layers in enumerate(described) for layer in layers}
    for layer, owner in sorted(owners.items()):
        shapes, about = described[owner][layer]
        tensors = own[layer].tensors() if layer in own else {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].contiguous() if layer in own else allocate(shape, dtype)
            processes.broadcast(tensor, owner)
            tensors[name] = tensor
        shared[layer] = own[layer] if layer in own else LayerRows.of_tensors(tensors, **about)
    return shared


def _description(rows: LayerRows) -> tuple[dict[str, tuple], dict]:
    """Shape and dtype of each tensor, and what else `LayerRows.of_tensors` takes."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in rows.tensors().items()}
    about = dict(hidden_size=rows.hidden_size, num_experts=rows.num_experts, scale=rows.scale)
    return shapes, about | {"of_logits": rows.encoder.of_logits}


def bound_to(base: BaseModel, config: "KNNMoEConfig", **origin) -> tuple["KNNMoEConfig", Origin]:
    """A copy of the configuration that names the base model, and a description of it; `origin` as in `Origin`."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base.name_or_path
    config.base_model_revision = config.base_model_revision or base.cached_commit()
    options = {name: getattr(config, name) for name in FIXED_AT_BUILD}
    return config, Origin(options, base.class_name, base.fingerprint(), **origin)
