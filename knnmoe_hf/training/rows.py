"""
Collects the rows of a build batch by batch: keys and values in files on disk, provenance in RAM.

The first process takes the rows of all processes over when a checkpoint is written, and reads them from there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.lookup.blocks import BLOCK, Table
from knnmoe_hf.lookup.mixing import encode_value
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.builders.base import OptimizedBatch
from knnmoe_hf.training.row_files import InterleavedRows, JoinedRows, RowFile, RowSource, on_disk
from knnmoe_hf.training.segments import Segment


@dataclass(frozen=True)
class BatchFacts:
    """
    What is kept in RAM of an optimised batch with n rows.

    Attributes:
        number: index of the batch in the dataset.
        rows: example id, position among the example's tokens, NLL before and NLL after; (n,) each.
        examples: `{example id: (2, length) int32}`, token ids and labels of the examples that have a row.
    """

    number: int
    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    examples: dict[int, Tensor]

    @property
    def count(self) -> int:
        """n, the number of rows."""
        return len(self.rows[0])


@dataclass(frozen=True)
class CollectedRows:
    """
    The rows of all processes in the order of the dataset.

    Attributes:
        keys: `{layer: (N, d)}` in the model's dtype, for the layers that this process encodes.
        values: `{layer: (N, E)}` float32, for the same layers.
        provenance: of all rows.
        digest: SHA-256 of the token ids and labels of all examples that have a target, in the order of the dataset.
    """

    keys: dict[int, Table]
    values: dict[int, Table]
    provenance: Provenance
    digest: str


class ReferenceRows:
    """
    Collects the rows of this process's batches.

    Args:
        gates: of the layers that are stored.
        value_space: as in `KNNMoEConfig`.
        folder: an existing folder for the files of keys and values; they delete themselves (see `RowFile`).

    Attributes:
        facts: of the batches whose rows this process has.
        segments: the rows that are in a checkpoint, of the first batches; the first process has all of them.
    """

    def __init__(self, gates: Sequence[Gate], value_space: str, folder: Path):
        self.gates, self.value_space, self.folder = gates, value_space, folder
        self.facts: list[BatchFacts] = []
        self.segments: list[Segment] = []
        self._example_ids: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        """New files, for the rows that are in no segment yet."""
        self.keys = {gate.layer: RowFile(self.folder) for gate in self.gates}
        self.values = {gate.layer: RowFile(self.folder) for gate in self.gates}

    def add(
        self,
        number: int,
        batch: OptimizedBatch,
        example_ids: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        """
        Adds a batch; positions and stored tokens are counted without padding.

        Args:
            number: index of the batch in the dataset.
            batch: the batch as optimised by a builder.
            example_ids: (B,) int64.
            input_ids, labels: (B, S) int64.
            attention_mask: (B, S), or None if there is no padding.

        Raises:
            ValueError: for an example id that an earlier example has.
        """
        example_ids, labels, example = example_ids.cpu(), labels.cpu(), batch.example.cpu()
        real = attention_mask.bool().cpu() if attention_mask is not None else torch.ones_like(labels).bool()
        position = (real.cumsum(dim=1) - 1)[example, batch.position.cpu()]
        examples = {}
        # examples without a target are left out, whether they share a batch with others or not
        for index in example.unique().tolist():
            example_id, kept = example_ids[index].item(), real[index]
            self._check_new(example_id)
            examples[example_id] = torch.stack([input_ids[index].cpu()[kept], labels[index][kept]]).int()
        for gate in self.gates:
            logits = batch.optimized[gate.layer], batch.logits[gate.layer]
            self.keys[gate.layer].append(batch.keys[gate.layer])
            self.values[gate.layer].append(
                encode_value(self.value_space, *logits, gate.rule.to(logits[0].device), gate.top_k).float()
            )
        rows = (example_ids[example], position, batch.nll_before.cpu(), batch.nll_after.cpu())
        self.facts.append(BatchFacts(number, rows, examples))

    def _check_new(self, example_id: int) -> None:
        if example_id in self._example_ids:
            raise ValueError(f"example_id {example_id} comes twice: give each example its own id, or drop the column.")
        self._example_ids.add(example_id)

    def restore(self, segments: Sequence[Segment], facts: Sequence[BatchFacts]) -> None:
        """
        Begins with the rows of a checkpoint; to be called in the first process.

        Raises:
            ValueError: for an example id that comes twice.
        """
        self.segments, self.facts = list(segments), list(facts)
        for example_id in (example for batch in facts for example in batch.examples):
            self._check_new(example_id)

    def gather_new(
        self, first: int, stop: int, processes: Processes = ALONE
    ) -> tuple[list[BatchFacts], dict[str, Table]] | None:
        """
        The rows of all processes that are in no segment; to be called in every process.

        Args:
            first, stop: the batches, which are all that are in no segment; later ones are left out.
            processes: that built.

        Returns:
            In the first process, what is known of the batches, and the tables `keys.{layer}` and `values.{layer}` of
            their rows (none if they have no row), both in the order of the batches. None in the others.
        """
        parts = processes.gather([batch for batch in self.facts if first <= batch.number < stop])
        turns = sorted((batch.number, part, batch.count) for part, facts in enumerate(parts) for batch in facts)
        tables = {}
        for gate in self.gates:
            for name, files in (("keys", self.keys), ("values", self.values)):
                gathered = _gather_files(files[gate.layer], processes, 0, self.folder)
                if gathered is not None and turns:
                    tables[f"{name}.{gate.layer}"] = InterleavedRows(gathered, [turn[1:] for turn in turns])
        if processes.index != 0:
            return None
        return sorted((batch for part in parts for batch in part), key=lambda batch: batch.number), tables

    def stored(self, segment: Segment | None, facts: Sequence[BatchFacts]) -> None:
        """
        The rows of all processes are in a checkpoint now; their files are given up.

        Args:
            segment: in the first process, what holds them; None in the others.
            facts: of their batches; `[]` in the others.
        """
        if segment is None:
            self.facts = []
        else:
            known = {batch.number for batch in self.facts}
            self.facts = self.facts + [batch for batch in facts if batch.number not in known]
            self.segments = [*self.segments, segment]
        self._begin()

    def _all_rows(self, name: str, layer: int) -> RowSource:
        """The rows of this process, of keys or of values, in the order of its batches."""
        files = self.keys if name == "keys" else self.values
        return JoinedRows([*(segment.rows_of(f"{name}.{layer}") for segment in self.segments), files.pop(layer)])

    def build_memory(
        self, config: KNNMoEConfig, model: nn.Module, tokenizer, processes: Processes = ALONE
    ) -> RoutingMemory:
        """The memory of the rows of all processes, encoded to files in `folder`; see `collect`."""
        rows = self.collect(processes)
        tables = (rows.keys, rows.values)
        return RoutingMemory.build(
            config, *tables, model, rows.provenance, tokenizer, rows.digest, processes, on_disk(self.folder)
        )

    def collect(self, processes: Processes = ALONE) -> CollectedRows:
        """
        The rows of all processes; to be called once, in every process.

        Each layer's rows go to the process that encodes it, and this object gives up its files.

        Raises:
            ValueError: if there is no row, or if examples of two processes have the same id.
        """
        parts = processes.gather(self.facts)
        owners = {batch.number: index for index, part in enumerate(parts) for batch in part}
        facts = sorted((batch for part in parts for batch in part), key=lambda batch: batch.number)
        if not facts:
            raise ValueError("no example has a target token, so there is nothing to store: check the labels.")
        digest, tokens = hashlib.sha256(), {}
        self._example_ids.clear()
        for example_id, ids_and_labels in (example for batch in facts for example in batch.examples.items()):
            self._check_new(example_id)
            digest.update(ids_and_labels.to(torch.int64).numpy().tobytes())
            tokens[example_id] = ids_and_labels[0]
        turns = [(owners[batch.number], batch.count) for batch in facts]
        keys, values = {}, {}
        for place, gate in enumerate(self.gates):
            layer = gate.layer
            for tables, name in ((keys, "keys"), (values, "values")):
                own = self._all_rows(name, layer)
                gathered = _gather_files(own, processes, processes.owner(place), self.folder)
                if gathered is not None:
                    tables[layer] = InterleavedRows(gathered, turns)
        provenance = Provenance.build(*map(torch.cat, zip(*(batch.rows for batch in facts))), tokens)
        return CollectedRows(keys, values, provenance, digest.hexdigest())


def _gather_files(file: RowSource, processes: Processes, owner: int, folder: Path) -> list[RowSource] | None:
    """
    Sends the rows of every process to the process `owner`, which need not share a disk with them.

    Returns:
        In the owner, one file for each process; None in the other processes.
    """
    files = [] if processes.index == owner else None
    for source, (rows, width, dtype) in enumerate(processes.gather((file.rows, file.width, file.dtype))):
        if source == owner:
            if files is not None:
                files.append(file)
        elif processes.index == source:
            for start in range(0, rows, BLOCK):
                block = torch.empty(min(BLOCK, rows - start), width, dtype=dtype)
                file.read(start, block)
                processes.send(block, owner)
        elif files is not None:
            files.append(RowFile(folder))
            for start in range(0, rows, BLOCK):
                block = torch.empty(min(BLOCK, rows - start), width, dtype=dtype)
                processes.receive(block, source)
                files[-1].append(block)
    return files
