"""Memories for the bench: each builder runs once over the references, every setting is made of what it found."""

import tempfile
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from benchmarks.settings import RAW, Setting, training_arguments
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, RoutingMemory, detach_memory
from knnmoe_hf.calibration.background import background_rows
from knnmoe_hf.lookup.mixing import encode_value
from knnmoe_hf.memory.encode import build_memory
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.training.refine import refine

_AFTERWARDS = ("max_rows", "min_gain", "merge_distance", "num_layers", "rekey")  # what a build does once rows are in


@dataclass(frozen=True)
class Found:
    """
    What a builder found.

    Attributes:
        keys, values: `{layer: (N, d)}` gate inputs and `{layer: (N, E)}` optimised logits, float32.
        provenance: with the references' indices as example ids.
        seconds: of CPU time that it took.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    provenance: Provenance
    seconds: float

    @classmethod
    def of(cls, memory: RoutingMemory, seconds: float) -> "Found":
        keys = {layer: rows.decoded_keys for layer, rows in memory.layers.items()}
        return cls(
            keys, {layer: rows.decoded_values for layer, rows in memory.layers.items()}, memory.provenance, seconds
        )

    @property
    def examples(self) -> int:
        return int(self.provenance.example_ids.max()) + 1

    def joined(self, other: "Found") -> "Found":
        keys, values = (
            {layer: torch.cat([table, theirs[layer]]) for layer, table in mine.items()}
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return Found(keys, values, self.provenance.joined(other.provenance), self.seconds + other.seconds)

    def first(self, count: int) -> "Found":
        """As if only the first `count` references had been given; a build's time is in proportion to them."""
        if count >= self.examples:
            return self
        keep = self.provenance.example_ids < count
        keys, values = ({layer: table[keep] for layer, table in side.items()} for side in (self.keys, self.values))
        return Found(keys, values, self.provenance.select(keep), self.seconds * count / self.examples)


class Memories:
    """
    Args:
        model: the frozen model.
        tokenizer: its own.
        references: all that any setting needs, in their order.
        seed: of the builders that draw at random.
    """

    def __init__(self, model: nn.Module, tokenizer, references: list[dict], seed: int):
        self.model, self.tokenizer, self.references, self.seed = model, tokenizer, references, seed
        self._found: dict[str, Found] = {}
        self._texts: dict[str, list[dict]] | None = None

    def make(self, setting: Setting) -> tuple[RoutingMemory, dict]:
        """A setting's memory, and what there is to say of it; `build_seconds` are of CPU time, and from nothing."""
        found = self._rows(setting)
        began = time.process_time()
        config = KNNMoEConfig(**setting.config)
        values = self._values(found, config.value_space, setting.optimised)
        memory = build_memory(config, found.keys, values, self.model, found.provenance, self.tokenizer)
        ordinary = self._ordinary(setting) if config.confidence == "calibrated" else {}
        memory, *more = refine(self.model, memory, training_arguments(setting.build), ordinary)
        seconds = found.seconds + time.process_time() - began
        notes = {type(note).__name__.lower(): asdict(note) for note in more if note is not None}
        size = {"rows": len(memory), "layers": list(memory.layers), "bytes": memory.nbytes}
        return memory, size | {"build_seconds": round(seconds, 2)} | notes

    def _rows(self, setting: Setting) -> Found:
        build = {name: value for name, value in setting.build.items() if name not in _AFTERWARDS}
        key, count = repr(sorted(build.items())), min(setting.references, len(self.references))
        have = self._found.get(key)
        if have is None or have.examples < count:
            more = self._build(build, have.examples if have else 0, count)
            have = self._found[key] = have.joined(more) if have else more
        return have.first(count)

    def _build(self, build: dict, start: int, stop: int) -> Found:
        rows = [row | {"example_id": start + i} for i, row in enumerate(self.references[start:stop])]
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            trainer = KNNMoETrainer(
                model=self.model,
                args=training_arguments(build | {"seed": self.seed}, folder),
                train_dataset=rows,
                config=KNNMoEConfig(**RAW, value_space="logits", confidence="rbf"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        detach_memory(self.model)
        return Found.of(trainer.memory, time.process_time() - began)

    def _ordinary(self, setting: Setting) -> dict[str, list[dict]]:
        if self._texts is None:  # what the trainer would read, each time anew
            self._texts = background_rows(self.tokenizer)
        return {kind: rows for kind, rows in self._texts.items() if kind in (setting.ordinary or self._texts)}

    def _values(self, found: Found, value_space: str, optimised: bool) -> dict[int, Tensor]:
        """The values that a value space stores; the gate's own logits are read off the keys again."""
        gates, values = {gate.layer: gate for gate in find_gates(self.model)}, {}
        for layer, keys in found.keys.items():
            gate = gates[layer]
            own = gate_logits(gate, keys)
            best = found.values[layer] if optimised else own
            values[layer] = encode_value(value_space, best, own, gate.rule, gate.top_k)
        return values
