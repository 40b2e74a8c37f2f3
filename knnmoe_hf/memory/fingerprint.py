"""Fingerprints, as a memory's folder keeps them: of its model's gates, and of its tokenizer.

A fingerprint of gates (`knnmoe_hf.models.fingerprint` computes it) recognises the model that a memory was built for,
loaded in float32, bfloat16 or float16. Loading one checkpoint in two dtypes gives the same gates with different
rounding. A fingerprint therefore has three digests: of the exact values, and of the values rounded to bfloat16 and to
float16. Two fingerprints are of the same gates if the exact digests are equal, or if one side's exact digest is the
other side's digest after rounding.

Correction biases are compared by random projections alone, which must agree within the rounding error.

Digests cannot decide when one model is loaded in bfloat16 and the other in float16, both rounded from float32 weights
that neither side has. Then the projections of the weights decide. Two different bfloat16 models never take this path:
it needs values on one side that bfloat16 cannot represent.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

HALVES = ("bfloat16", "float16")


def is_fingerprint(content: Any) -> bool:
    """Whether JSON content has the form of a fingerprint."""
    if not isinstance(content, Mapping) or set(content) != {"float32", *HALVES, "projections", "norms"}:
        return False
    if not all(isinstance(content[name], str) for name in ("float32", *HALVES)):
        return False
    tables = (content["projections"], content["norms"])
    if not all(isinstance(table, list) and all(isinstance(row, list) for row in table) for table in tables):
        return False
    if not all(isinstance(number, float) and number >= 0 for row in content["norms"] for number in row):
        return False
    if list(map(len, tables[0])) != list(map(len, tables[1])):
        return False
    return all(
        isinstance(number, float) and math.isfinite(number) for table in tables for row in table for number in row
    )


def same_gates(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of the same gates, loaded in float32, bfloat16 or float16."""
    return _projections_agree(one, other) and _digests_agree(one, other)


def _digests_agree(one: dict, other: dict) -> bool:
    """As far as digests can tell: True where one side is in bfloat16 and the other in float16."""
    if one["float32"] == other["float32"]:
        return True
    if any(one[half] == other["float32"] or other[half] == one["float32"] for half in HALVES):
        return True
    in_bf16 = [f["bfloat16"] == f["float32"] for f in (one, other)]
    in_fp16 = [f["float16"] == f["float32"] for f in (one, other)]
    return in_bf16 == [True, False] and in_fp16[1] or in_bf16 == [False, True] and in_fp16[0]


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


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary and special tokens, as a hexadecimal string."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
