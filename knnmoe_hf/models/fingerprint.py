"""Recognising the model that a memory was built for, by its gates' weights, in whatever precision it is loaded.

Two loads of one checkpoint hold the same gates rounded differently. So a fingerprint has a digest of the exact values
and one of their rounding to each half precision: the same gates are either equal, or one is exactly the other's
rounding. If one side is bf16 and the other fp16, both roundings of float32 weights that are not at hand, the digests
cannot tell; then random projections must agree within what rounding allows. That case is told from two different bf16
models by the bits: an fp16 rounding has values that bf16 cannot hold.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from knnmoe_hf.models.gates import Gate

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BUCKETS = 8


def fingerprint(gates: list[Gate]) -> dict:
    """
    The fingerprint of a model's gates, as JSON.

    Args:
        gates: of one model, as `find_gates` returns them; offloaded weights are read where they are.

    Returns:
        `{"float32": digest, "bfloat16": digest, "float16": digest, "projections": [[...]], "norms": [[...]]}`: SHA-256
        of the parameters' float32 values, of these rounded to each half precision, and for each gate 8 projections of
        its parameters on random signs, with the L2 norms of the parameters in each.
    """
    digests = {name: hashlib.sha256() for name in ("float32", *_HALVES)}
    projections, norms = [], []
    for gate in gates:
        with align_module_device(gate.module):
            parts = [p.detach().float().cpu().flatten() for _, p in sorted(gate.module.named_parameters())]
        values = torch.cat(parts)
        digests["float32"].update(_bytes(values))
        for name, dtype in _HALVES.items():
            digests[name].update(_bytes(values.to(dtype).float()))
        buckets = _signed_buckets(values)
        projections.append(buckets.sum(dim=-1).tolist())
        norms.append(buckets.norm(dim=-1).tolist())
    return {name: d.hexdigest() for name, d in digests.items()} | {"projections": projections, "norms": norms}


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
    # bf16 rounds each weight by at most 2^-8 of it, at random: a sum of signed weights moves by a few times less
    # than 2^-8 of their norm; twice that has not been exceeded, and other weights differ by about the norm itself
    same_shape = list(map(len, one["norms"])) == list(map(len, other["norms"]))
    return same_shape and all(math.isclose(a, b, rel_tol=0.0, abs_tol=norm * 2**-7) for a, b, norm in pairs)


def _bytes(values: Tensor) -> memoryview:
    return memoryview((values + 0.0).numpy())  # + 0.0: one zero


def _signed_buckets(values: Tensor) -> Tensor:
    """Weights with random signs, dealt out to `_BUCKETS` rows; zeros fill up the last."""
    generator = torch.Generator().manual_seed(values.numel())
    padded = torch.zeros(math.ceil(values.numel() / _BUCKETS) * _BUCKETS, dtype=torch.float64)
    padded[: values.numel()] = values.double()
    signs = torch.randint(0, 2, padded.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return (padded * signs).view(-1, _BUCKETS).T


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary and special tokens, as a hexadecimal string."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
