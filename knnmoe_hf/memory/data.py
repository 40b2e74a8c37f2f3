"""What a memory holds: frozen, and checked against its configuration and its base model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from knnmoe_hf.errors import MemoryMismatchError, shown
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory.base_model import BaseModel
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.fingerprint import same_gates
from knnmoe_hf.memory.history import OPTIONS_CHANGED, differences
from knnmoe_hf.memory.manifest import CalibrationRecord, Origin
from knnmoe_hf.memory.next_tokens import check_next_tokens, next_tokens_of, why_unknown
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.task_record import TaskRecord
from knnmoe_hf.memory.verdict import Verdict

if TYPE_CHECKING:  # a class of transformers, which takes seconds to import
    from knnmoe_hf.config import KNNMoEConfig


@dataclass(frozen=True, eq=False, repr=False)
class MemoryData:
    """
    The contents of a `RoutingMemory`, which adds what can be done with them.

    A memory is never changed: `dataclasses.replace` and the editing methods of `RoutingMemory` make another one. Each
    memory has its own copies of `config`, `origin`, `calibration`, `verdict` and `card_data`; tensors, provenance and
    tokenizer are shared.

    Attributes:
        config: how it is searched and mixed. Options that describe the stored rows
            (`knnmoe_hf.lookup.options.FIXED_AT_BUILD`, `layers`) must stay what they are; the others may be changed,
            which takes effect when the memory is attached or saved.
        layers: `{decoder layer: LayerRows}`, read-only, in the order of the layers; `config.layers` lists them.
        origin: what the memory was built from.
        provenance: which example each row came from, or None.
        tokenizer: saved beside the memory, so that `pipeline` needs nothing else; or None.
        calibration: what `knnmoe_hf.calibrate` read and found; None for a memory that was not calibrated.
        verdict: whether it helps, as measured when it was built or calibrated; None if that was not measured, or not
            with these rows and options. Changing `config` drops it when the memory is saved.
        stored_next_tokens: (N,) int32, the token that follows each row, where it is kept apart from the text of the
            references; `next_tokens` has it in either case.
        task_record: the benchmark that it was built from, or None.
        card_data: what its card says beside; its measurements are dropped where there is no verdict.
    """

    config: "KNNMoEConfig"
    layers: Mapping[int, LayerRows]
    origin: Origin
    provenance: Provenance | None = None
    tokenizer: Any = None
    calibration: CalibrationRecord | None = None
    verdict: Verdict | None = None
    stored_next_tokens: Tensor | None = None
    task_record: TaskRecord | None = None
    card_data: CardData = CardData()

    def __post_init__(self):
        layers = dict(sorted(self.layers.items()))
        own = {name: copy.deepcopy(getattr(self, name)) for name in ("config", "origin", "calibration")}
        own["config"].layers = list(layers) or None
        holds = self.verdict is not None and self.verdict.holds_for(own["config"])
        own["verdict"] = copy.deepcopy(self.verdict) if holds else None
        own["card_data"] = copy.deepcopy(self.card_data if holds else replace(self.card_data, measured=None))
        if self.verdict is not None and not holds:  # the configuration was edited in place
            changed = differences(self.verdict.settings, own["config"])
            own["card_data"] = own["card_data"].noted(f"{OPTIONS_CHANGED}{', '.join(changed)}")
        own["layers"] = MappingProxyType(layers)
        for name, value in own.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "stored_next_tokens", check_next_tokens(self.stored_next_tokens, len(self)))

    def __reduce__(self):
        # copying and pickling go through the constructor too; a read-only view can be neither copied nor pickled
        parts = {field.name: getattr(self, field.name) for field in fields(self)} | {"layers": dict(self.layers)}
        return type(self), tuple(parts.values())

    def __len__(self) -> int:
        """Rows, that is reference tokens; each has a key and a value in every layer."""
        return next((len(rows.key_codes) for rows in self.layers.values()), 0)

    def __repr__(self) -> str:
        space, size = self.origin.options["value_space"], f"{self.nbytes / 2**20:.1f} MiB"
        return f"{type(self).__name__}({len(self)} rows, layers {list(self.layers)}, {space}, {size})"

    @cached_property
    def next_tokens(self) -> Tensor | None:
        """
        (N,) int32, the token that follows each row, in their order; None if that of any row is not known.

        From the text of the references, or as stored without it. In this order they are the text of the references.
        """
        return next_tokens_of(len(self), self.provenance, self.stored_next_tokens)

    @property
    def nbytes_per_layer(self) -> dict[int, int]:
        """Bytes of keys and values, codecs included, `{layer: bytes}`."""
        return {layer: rows.nbytes for layer, rows in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, without provenance and next tokens."""
        return sum(self.nbytes_per_layer.values())

    def check_config(self) -> None:
        """
        Checks that the configuration still describes the stored rows.

        Raises:
            MemoryMismatchError: if an option that says how rows are stored, or `layers`, is no longer what it was, or
                if `recall` needs next tokens, and there are none.
            ValueError: for any other bad option.
        """
        self.config.retrieval_options()
        for name, built in self.origin.options.items():
            value = getattr(self.config, name)
            if built != value:
                raise MemoryMismatchError(
                    f"this memory was built with {name}={built!r} and cannot be read as {shown(value)}: build it "
                    "anew, or store its rows otherwise with `recoded`."
                )
        value = self.config.layers
        if value is not None and sorted(value) != list(self.layers):
            raise MemoryMismatchError(
                f"config.layers={shown(value)} are not the layers of this memory's rows, {shown(list(self.layers))}: "
                "to use some of them, open the memory with from_pretrained(..., layers=...)."
            )
        self.check_recall(self.config.recall)

    def check_recall(self, recall: str) -> None:
        """
        Checks that the memory holds what this `recall`, one of `knnmoe_hf.lookup.options.RECALLS`, needs.

        Raises:
            MemoryMismatchError: for anything but `"routing"` where `next_tokens` is None.
        """
        if recall != "routing" and self.next_tokens is None:
            raise MemoryMismatchError(
                f"recall={recall!r} is not possible: {why_unknown(self.provenance)}; use recall='routing', or build "
                "the memory anew and save it with provenance='text' or next_tokens=True."
            )

    def check_model(self, model: nn.Module) -> None:
        """
        Checks that the memory belongs to `model`.

        Raises:
            MemoryMismatchError: naming what differs.
        """
        base = BaseModel(model)
        for layer, rows in self.layers.items():
            built, gate = (rows.hidden_size, rows.num_experts), base.gates.get(layer)
            found = (gate.hidden_size, gate.num_experts) if gate is not None else None
            if found != built:
                actual = f"{found[0]} and {found[1]} there" if found else "no gate there"
                raise MemoryMismatchError(
                    f"this memory has hidden size {built[0]} and {built[1]} experts in layer {layer}, the model has "
                    f"{actual}: attach it to {shown(self.config.base_model_name_or_path)}, for which it was built."
                )
        stored = self.origin.base_model_fingerprint
        if stored is not None and not same_gates(dict(stored), base.fingerprint()):
            name, revision = self.config.base_model_name_or_path, self.config.base_model_revision
            built_for = shown(name) if name else "its own model, whose name is not recorded"
            raise MemoryMismatchError(
                f"the gates of this {base.class_name} are not those that this memory was built for: attach it to "
                f"{built_for}{f' at revision {shown(revision)}' if revision else ''}, or build it anew for this model."
            )


Memory = TypeVar("Memory", bound=MemoryData)
"""A memory goes in and another of the same class comes out."""
