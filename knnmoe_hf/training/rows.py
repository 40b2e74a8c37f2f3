"""The rows of a build as they come in, batch by batch: numbers go to disk, what is known of them stays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.lookup.blocks import BLOCK, Table
from knnmoe_hf.lookup.mixing import encode_value
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import OptimizedBatch
from knnmoe_hf.training.row_files import DealtRows, RowFile


@dataclass(frozen=True)
class BatchFacts:
    """
    What is kept in memory of a solved batch with n rows.

    Attributes:
        number: of the batch in the data set.
        rows: (n,) each: example id, position among the example's tokens, NLL before and after.
        examples: `{example id: (2, length) int32}`, tokens and labels of the examples that have a row.
    """

    number: int
    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    examples: dict[int, Tensor]

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows[0])


@dataclass(frozen=True)
class CollectedRows:
    """
    The rows of all processes in the data set's order.

    Attributes:
        keys: `{layer: (N, d)}` in the model's dtype; values: `{layer: (N, E)}` float32; of the layers that are this
            process's to encode.
        provenance: of all rows.
        digest: SHA-256 of the tokens and labels of all examples that have a target, in their order.
    """

    keys: dict[int, Table]
    values: dict[int, Table]
    provenance: Provenance
    digest: str


class ReferenceRows:
    """
    Collects rows.

    Args:
        gates: of the layers that every batch brings.
        value_space: in which values are stored.
        folder: on whose disk keys and values are kept; they go when nobody needs them, whatever happens.
    """

    def __init__(self, gates: Sequence[Gate], value_space: str, folder: Path):
        self.gates, self.value_space, self.folder = gates, value_space, folder
        self.keys = {gate.layer: RowFile(folder) for gate in gates}
        self.values = {gate.layer: RowFile(folder) for gate in gates}
        self.facts: list[BatchFacts] = []
        self._names: set[int] = set()

    def add(
        self,
        number: int,
        solved: OptimizedBatch,
        example_ids: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        """Takes the solved batch `number` of examples `example_ids` (B,), tokens (B, S); padding leaves no trace."""
        example_ids, labels, example = example_ids.cpu(), labels.cpu(), solved.example.cpu()
        real = attention_mask.bool().cpu() if attention_mask is not None else torch.ones_like(labels).bool()
        position = (real.cumsum(dim=1) - 1)[example, solved.position.cpu()]  # among the tokens that are kept
        examples = {}
        for index in example.unique().tolist():  # one without a target is skipped here as it is alone in a batch
            name, kept = example_ids[index].item(), real[index]
            self._name(name)
            examples[name] = torch.stack([input_ids[index].cpu()[kept], labels[index][kept]]).int()
        for gate in self.gates:
            logits = solved.optimized[gate.layer], solved.logits[gate.layer]
            self.keys[gate.layer].append(solved.keys[gate.layer])
            self.values[gate.layer].append(encode_value(self.value_space, *logits, gate.rule, gate.top_k).float())
        rows = (example_ids[example], position, solved.nll_before.cpu(), solved.nll_after.cpu())
        self.facts.append(BatchFacts(number, rows, examples))

    def _name(self, example_id: int) -> None:
        if example_id in self._names:
            raise ValueError(f"example_id {example_id} comes twice: give each example an id of its own.")
        self._names.add(example_id)

    def collect(self, processes: Processes = ALONE) -> CollectedRows:
        """
        The rows of all processes, which are not kept here any longer.

        Raises:
            ValueError: if there is no row, or an example of one process has the id of another's.
        """
        facts = sorted((batch for part in processes.gather(self.facts) for batch in part), key=lambda b: b.number)
        if not facts:
            raise ValueError("no example has a target token, so there is nothing to store: check the labels.")
        digest, tokens = hashlib.sha256(), {}
        self._names.clear()
        for name, both in (example for batch in facts for example in batch.examples.items()):
            self._name(name)
            digest.update(both.to(torch.int64).numpy().tobytes())
            tokens[name] = both[0]
        turns = [(batch.number % processes.count, batch.count) for batch in facts]
        keys, values = {}, {}
        for place, gate in enumerate(self.gates):
            layer = gate.layer
            for side, files in ((keys, self.keys), (values, self.values)):
                found = _brought(files.pop(layer), processes, processes.owner(place), self.folder)
                if found is not None:
                    side[layer] = DealtRows(found, turns)
        provenance = Provenance.build(*map(torch.cat, zip(*(batch.rows for batch in facts))), tokens)
        return CollectedRows(keys, values, provenance, digest.hexdigest())


def _brought(file: RowFile, processes: Processes, owner: int, folder: Path) -> list[RowFile] | None:
    """The file of each process, in the process `owner`; None in the others. They need not share a disk."""
    found = [] if processes.index == owner else None
    for source, (rows, width, dtype) in enumerate(processes.gather((file.rows, file.width, file.dtype))):
        if source == owner:
            if found is not None:
                found.append(file)
        elif processes.index == source:
            for start in range(0, rows, BLOCK):
                block = torch.empty(min(BLOCK, rows - start), width, dtype=dtype)
                file.read(start, block)
                processes.send(block, owner)
        elif found is not None:
            found.append(RowFile(folder))
            for start in range(0, rows, BLOCK):
                block = torch.empty(min(BLOCK, rows - start), width, dtype=dtype)
                processes.receive(block, source)
                found[-1].append(block)
    return found
