"""The rows of a build as they come in, batch by batch."""

import hashlib

import torch
from torch import Tensor

from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.training.solver import SolvedBatch, share_worse


class ReferenceRows:
    """
    Collects rows on the host.

    Args:
        layers: the layers that every batch brings.
    """

    def __init__(self, layers: list[int]):
        self.keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.values: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.rows: list[tuple[Tensor, ...]] = []  # example id, position, NLL before, NLL after
        self.tokens: dict[int, Tensor] = {}
        self.examples = 0
        self._changed: list[tuple[float, int]] = []
        self._digest = hashlib.sha256()

    def add(
        self,
        solved: SolvedBatch,
        values: dict[int, Tensor],
        example_ids: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        """Takes a solved batch of examples `example_ids` (B,) with their tokens (B, S); padding leaves no trace."""
        example_ids, labels, example = example_ids.cpu(), labels.cpu(), solved.example.cpu()
        real = attention_mask.bool().cpu() if attention_mask is not None else torch.ones_like(labels).bool()
        for layer, key in solved.keys.items():
            self.keys[layer].append(key.cpu())
            self.values[layer].append(values[layer].cpu())
        position = (real.cumsum(dim=1) - 1)[example, solved.position.cpu()]  # among the tokens that are kept
        self.rows.append((example_ids[example], position, solved.nll_before.cpu(), solved.nll_after.cpu()))
        self._changed.append((solved.experts_changed, len(example)))
        for index in example.unique().tolist():  # one without a target is skipped here as it is alone in a batch
            name, kept = example_ids[index].item(), real[index]
            if name in self.tokens:
                raise ValueError(f"example_id {name} comes twice: give each example an id of its own.")
            ids = input_ids[index].cpu()[kept]
            self.tokens[name] = ids.int()
            self._digest.update(torch.stack([ids, labels[index][kept]]).to(torch.int64).numpy().tobytes())
        self.examples += len(labels)

    def skip(self, examples: int) -> None:
        """Counts examples without a target."""
        self.examples += examples

    def collect(self) -> tuple[dict[int, Tensor], dict[int, Tensor], Provenance]:
        """
        Keys and values by layer, and where the rows came from.

        Raises:
            ValueError: if there is no row.
        """
        if not self.rows:
            raise ValueError("no example has a target token, so there is nothing to store: check the labels.")
        keys = {layer: torch.cat(self.keys.pop(layer)) for layer in list(self.keys)}  # popped: rows are not held twice
        values = {layer: torch.cat(self.values.pop(layer)) for layer in list(self.values)}
        return keys, values, Provenance.build(*map(torch.cat, zip(*self.rows)), self.tokens)

    def summary(self) -> dict[str, float]:
        """What the whole build came to."""
        _, _, before, after = map(torch.cat, zip(*self.rows))
        total = sum(rows for _, rows in self._changed)
        return {
            "nll_before": before.mean().item(),
            "nll_after": after.mean().item(),
            "experts_changed": sum(share * rows for share, rows in self._changed) / total,
            "tokens_worse": share_worse(before, after),
            "rows": total,
        }

    def digest(self) -> str:
        """SHA-256 of the tokens and labels of all examples that have a target, in their order."""
        return self._digest.hexdigest()
