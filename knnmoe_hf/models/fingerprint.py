"""Recognising the model that a memory was built for by its gates' weights, in float32, bfloat16 or float16.

Loading one checkpoint in two dtypes gives the same gates with different rounding. A fingerprint therefore has three
digests: of the exact values, and of the values rounded to bfloat16 and to float16. Two fingerprints are of the same
gates if the exact digests are equal, or if one side's exact digest is the other side's digest after rounding.

Digests cannot decide when one model is loaded in bfloat16 and the other in float16, both rounded from float32 weights
that neither side has. Then random projections of the weights must agree within the rounding error. Two different
bfloat16 models never take this path: it needs values on one side that bfloat16 cannot represent.

All tensors of a gate are assumed to be loaded in one dtype. A family that keeps some of them in float32 whatever the
model's dtype is (`_keep_in_fp32_modules`) needs its own comparison here.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from knnmoe_hf.models.gates import Gate

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BUCKETS = 8  # projections per gate


def fingerprint(gates: list[Gate]) -> dict:
    """
    The fingerprint of a model's gates, as JSON.

    Args:
        gates: of one model, as `find_gates` returns them; the weights may be offloaded.

    Returns:
        `{"float32": digest, "bfloat16": digest, "float16": digest, "projections": [[...]], "norms": [[...]]}`: SHA-256
        of the gates' tensors (parameters and persistent buffers) as float32, and after rounding to each half
        precision; for each gate, 8 sums of its values with random signs, and the L2 norm of the values in each sum.
    """
    digests = {name: hashlib.sha256() for name in ("float32", *_HALVES)}
    projections, norms = [], []
    for gate in gates:
        with align_module_device(gate.module):
            parts = [tensor.detach().float().cpu().flatten() for tensor in _saved_tensors(gate.module)]
        values = torch.cat(parts)
        digests["float32"].update(_bytes(values))
        for name, dtype in _HALVES.items():
            digests[name].update(_bytes(values.to(dtype).float()))
        buckets = _signed_buckets(values)
        projections.append(buckets.sum(dim=-1).tolist())
        norms.append(buckets.norm(dim=-1).tolist())
    return {name: d.hexdigest() for name, d in digests.items()} | {"projections": projections, "norms": norms}


def _saved_tensors(gate: nn.Module) -> list[Tensor]:
    """A gate's parameters and persistent buffers, in the order of their names."""
    saved = gate.state_dict()
    buffers = {name: buffer for name, buffer in gate.named_buffers() if name in saved}
    return [tensor for _, tensor in sorted((dict(gate.named_parameters()) | buffers).items())]


def is_fingerprint(content: Any) -> bool:
    """Whether JSON content has the form of a fingerprint."""
    if not isinstance(content, Mapping) or set(content) != {"float32", *_HALVES, "projections", "norms"}:
        return False
    if not all(isinstance(content[name], str) for name in ("float32", *_HALVES)):
        return False
    tables = (content["projections"], content["norms"])
    if not all(isinstance(table, list) and all(isinstance(row, list) for row in table) for table in tables):
        return False
    return all(
        isinstance(number, float) and math.isfinite(number) for table in tables for row in table for number in row
    )


def same_gates(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of the same gates, loaded in float32, bfloat16 or float16."""
    if one["float32"] == other["float32"]:
        return True
    if any(one[half] == other["float32"] or other[half] == one["float32"] for half in _HALVES):
        return True
    in_bf16 = [f["bfloat16"] == f["float32"] for f in (one, other)]
    in_fp16 = [f["float16"] == f["float32"] for f in (one, other)]
    if in_bf16 == [True, False] and in_fp16[1] or in_bf16 == [False, True] and in_fp16[0]:
        return _projections_agree(one, other)
    return False


def _projections_agree(one: dict, other: dict) -> bool:
    pairs = [
        (a, b, norm)
        for left, right, norms in zip(one["projections"], other["projections"], one["norms"])
        for a, b, norm in zip(left, right, norms)
    ]
    # bf16 changes each weight by at most 2^-8 of its size, in random directions, so a sum of signed weights changes by
    # a fraction of 2^-8 of their norm. The tolerance of 2^-7 is never exceeded by rounding; the sums of different
    # weights differ by about the norm itself.
    same_shape = list(map(len, one["norms"])) == list(map(len, other["norms"]))
    return same_shape and all(math.isclose(a, b, rel_tol=0.0, abs_tol=norm * 2**-7) for a, b, norm in pairs)


def _bytes(values: Tensor) -> memoryview:
    return memoryview((values + 0.0).numpy())  # + 0.0 turns -0.0 into 0.0


def _signed_buckets(values: Tensor) -> Tensor:
    """The values with random signs, distributed over `_BUCKETS` rows in turns; zeros fill up the end."""
    generator = torch.Generator().manual_seed(values.numel())
    padded = torch.zeros(math.ceil(values.numel() / _BUCKETS) * _BUCKETS, dtype=torch.float64)
    padded[: values.numel()] = values.double()
    signs = torch.randint(0, 2, padded.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return (padded * signs).view(-1, _BUCKETS).T


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary and special tokens, as a hexadecimal string."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
