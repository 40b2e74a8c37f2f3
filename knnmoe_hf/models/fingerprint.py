"""
The fingerprint of a model's gates; `knnmoe_hf.memory.fingerprint` says what is in it and compares two.

Most families load the correction bias of a gate in float32 whatever the model's dtype is, and some do not. It is
therefore no part of the digests, which compare rounded values to the bit, but only of the projections.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.memory.fingerprint import HALVES
from knnmoe_hf.models.gates import Gate, weights_of
from knnmoe_hf.models.offload import is_offloaded, whole

_BUCKETS = 8  # projections per gate


def fingerprint(gates: list[Gate]) -> dict:
    """
    The fingerprint of a model's gates, as JSON.

    Args:
        gates: of one model, as `find_gates` returns them; the weights may be offloaded.

    Returns:
        `{"float32": digest, "bfloat16": digest, "float16": digest, "projections": [[...]], "norms": [[...]]}`: SHA-256
        of the gates' tensors (parameters and persistent buffers, but no correction bias) as float32, and after
        rounding to each half precision; for each gate, 8 sums of its values with random signs, and the L2 norm of the
        values in each sum; and the same once more for the correction biases of all gates, if they have any.

    Raises:
        UnsupportedModelError: for a gate without weights, or whose weights are quantised.
    """
    digests = {name: hashlib.sha256() for name in ("float32", *HALVES)}
    projections, norms, corrections = [], [], []
    for gate in gates:
        with weights_of(gate):
            _check_readable(gate)
            parts = [whole(tensor.detach()).float().cpu().flatten() for tensor in _saved_tensors(gate)]
            if (correction := gate.current_rule().bias) is not None:
                corrections.append(whole(correction).float().cpu())
        values = torch.cat(parts)
        digests["float32"].update(_bytes(values))
        for name in HALVES:
            digests[name].update(_bytes(values.to(getattr(torch, name)).float()))
        _append_sums(values, projections, norms)
    if corrections:
        _append_sums(torch.cat(corrections), projections, norms)
    return {name: d.hexdigest() for name, d in digests.items()} | {"projections": projections, "norms": norms}


def _check_readable(gate: Gate) -> None:
    if is_offloaded(gate.module):
        raise UnsupportedModelError(
            f"the gate {gate.name} is on the meta device and has no weights there: load the model with "
            "from_pretrained, and offload it with accelerate (device_map, disk_offload) if it is too large."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in gate.around):
        raise UnsupportedModelError(
            f"the gate {gate.name} is inside FullyShardedDataParallel, which has cut its weights and joined them with "
            "others: attach the memory before wrapping the model, or use torch.distributed.fsdp.fully_shard."
        )
    weight = gate.weight
    plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")  # or split over processes
    if not (plain and weight.is_floating_point()):
        raise UnsupportedModelError(
            f"the gate {gate.name} is quantised to {type(weight).__name__} ({weight.dtype}), and a memory belongs to "
            "the exact gates: name the gates among the modules that are not converted when the model is quantised."
        )


def _saved_tensors(gate: Gate) -> list[Tensor]:
    """A gate's parameters and persistent buffers, in the order of their names, without its correction bias."""
    saved = gate.module.state_dict()
    buffers = {name: buffer for name, buffer in gate.module.named_buffers() if name in saved}
    tensors = dict(gate.module.named_parameters()) | buffers
    return [tensor for name, tensor in sorted(tensors.items()) if name != gate.family.bias]


def _append_sums(values: Tensor, projections: list, norms: list) -> None:
    buckets = _signed_buckets(values)
    projections.append(buckets.sum(dim=-1).tolist())
    norms.append(buckets.norm(dim=-1).tolist())


def _bytes(values: Tensor) -> memoryview:
    return memoryview((values + 0.0).numpy())  # + 0.0 turns -0.0 into 0.0


def _signed_buckets(values: Tensor) -> Tensor:
    """The values with random signs, distributed over `_BUCKETS` rows in turns; zeros fill up the end."""
    generator = torch.Generator().manual_seed(values.numel())
    padded = torch.zeros(math.ceil(values.numel() / _BUCKETS) * _BUCKETS, dtype=torch.float64)
    padded[: values.numel()] = values.double()
    signs = torch.randint(0, 2, padded.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return (padded * signs).view(-1, _BUCKETS).T
