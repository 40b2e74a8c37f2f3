"""
An audit of a memory's rows: what hostile or broken ones would do to a model, told without the model.

An honest build leaves keys of which none attracts queries from everywhere, values that are near those of a gate, next
tokens that the keys tell, and a confidence that is low far away from all keys. The limits (`checks`) are far from what
memories of the lab models have. What only the base model can tell, such as values whose experts were exchanged in all
rows alike, is not seen here: `knnmoe evaluate` measures what a memory does to text.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from knnmoe_hf.memory.audit.checks import Finding, LayerFigures, check_layer
from knnmoe_hf.memory.audit.trust import FrequentToken, confidence_far_away, frequent_tokens
from knnmoe_hf.memory.data import MemoryData

__all__ = ["LEAST_ROWS", "Audit", "Finding", "FrequentToken", "LayerFigures", "audit"]

LEAST_ROWS = 20
"""From fewer rows nothing can be told: none is unlike the others, and nothing is far away."""
_LIFT = 1.5  # at least 2.4 in memories of the lab models, and 1 where keys do not tell the token


@dataclass(frozen=True)
class Audit:
    """
    What an audit saw.

    Attributes:
        layers: `{layer: figures}`; empty for a memory of fewer than `LEAST_ROWS`.
        next_tokens: the most frequent ones; empty where they are not known.
        findings: what an honest build does not leave; empty if all is well.
        examples: `{id: how many of its rows are suspicious}`, most first; empty without provenance.
        rows: N, and `suspicious`, how many of them cause findings.
    """

    layers: Mapping[int, LayerFigures]
    next_tokens: list[FrequentToken]
    findings: list[Finding]
    examples: Mapping[int, int]
    rows: int
    suspicious: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; a finding with the number of its rows."""
        findings = [
            {"check": f.check, "layer": f.layer, "rows": int(f.rows.sum()), "sentence": f.sentence}
            for f in self.findings
        ]
        return {
            "rows": self.rows,
            "suspicious_rows": self.suspicious,
            "layers": {str(layer): asdict(figures) for layer, figures in self.layers.items()},
            "next_tokens": [token._asdict() for token in self.next_tokens],
            "findings": findings,
            "examples": {str(id): count for id, count in self.examples.items()},
        }


def audit(memory: MemoryData) -> Audit:
    """
    Looks for rows and numbers that an honest build does not leave; some seconds for each layer of 100,000 rows.

    Without provenance every row counts as its own example, and none can be taken out by `knnmoe remove`.
    """
    count = len(memory)
    if count < LEAST_ROWS:
        return Audit({}, [], [], {}, count, 0)
    known = memory.provenance is not None
    ids = memory.provenance.example_ids if known else torch.arange(count)
    options = memory.config.retrieval_options()
    far = confidence_far_away(memory.layers, options, memory.calibration.fits if memory.calibration else {})
    checked = {layer: check_layer(memory, layer, ids, far[layer]) for layer in memory.layers}
    findings = [finding for _, found in checked.values() for finding in found]
    rows = torch.zeros(count, dtype=torch.bool)
    for finding in findings:
        rows |= finding.rows
    tokens: list[FrequentToken] = []
    if memory.next_tokens is not None:
        last = memory.layers[max(memory.layers)]
        tokens = frequent_tokens(last, memory.next_tokens, ids, options.num_neighbors, rows)
        of_tokens = [_of_token(token, memory.next_tokens) for token in tokens if token.lift < _LIFT]
        findings += of_tokens
        for finding in of_tokens:
            rows |= finding.rows
    examples = _counts(ids[rows]) if known else {}
    figures = {layer: figures for layer, (figures, _) in checked.items()}
    return Audit(figures, tokens, findings, examples, count, int(rows.sum()))


def _of_token(token: FrequentToken, next_tokens: Tensor) -> Finding:
    clause = (
        f"token {token.token} follows {token.share:.1%} of the rows, and rows near these only {token.lift:.1f} times "
        "as often as any row, so that keys do not tell it"
    )
    return Finding("next_token", None, clause, next_tokens == token.token)


def _counts(ids: Tensor) -> dict[int, int]:
    names, counts = ids.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return dict(zip(names[order].tolist(), counts[order].tolist()))
