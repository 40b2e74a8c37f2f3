"""A memory made ready for a model: a lookup for each of its layers."""

import copy
from collections.abc import Mapping

from torch import Tensor

from knnmoe_hf.lookup.confidence import Confidence
from knnmoe_hf.lookup.make import fit_for, make_confidences, make_lookups, make_voting
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.lookup.torch_lookup import TorchLookup
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.owners import owner_of
from knnmoe_hf.models.probe import ProbedModel


class AttachedMemory(Overrides):
    """
    A memory prepared for a model: one lookup for each of its layers, with a frozen snapshot of its options.

    Attributes:
        memory: the memory that was prepared. Changing its `config` afterwards has no effect here.
        model: routing rules and devices of the model, as probed.
        options: the snapshot.
    """

    def __init__(
        self,
        memory: RoutingMemory,
        model: ProbedModel,
        lookups: Mapping[int, TorchLookup],
        options: RetrievalOptions,
    ):
        super().__init__(lookups)
        self.memory, self.model, self.options, self.watches = memory, model, options, model.watches
        self.owner = owner_of(lookups, options)
        self.recalling_layer = next((one for one, lookup in lookups.items() if lookup.voting is not None), None)
        self.logits = model.logits

    @classmethod
    def of(cls, memory: RoutingMemory, model: ProbedModel, options: RetrievalOptions) -> "AttachedMemory":
        """Moves each layer's rows to the device of its gate and makes the lookups, without checking that they fit."""
        layers = {layer: rows.to(model.devices[layer]) for layer, rows in memory.layers.items()}
        lookups = make_lookups(layers, model.routers, options, _next_tokens(memory, options), _fits(memory))
        return cls(memory, model, lookups, options)

    def with_confidences(self, confidences: Mapping[int, Confidence]) -> "AttachedMemory":
        """
        The same rows and engines with other confidences, `{layer: confidence}`; the result has only these layers.

        Neither rows nor engines are copied or rebuilt.
        """
        lookups = {
            layer: self[layer].with_confidence(one, self.options, self[layer].voting)
            for layer, one in confidences.items()
        }
        return AttachedMemory(self.memory, self.model, lookups, self.options)

    def with_options(self, options: RetrievalOptions, memory: RoutingMemory | None = None) -> "AttachedMemory":
        """
        The same rows and engines with the confidence, and the recall of next tokens, that other options name.

        Args:
            options: may differ from `self.options` in `confidence`, in its thresholds, in `recall` (which needs
                `ProbedModel.logits` unless it is `"routing"`) and in what begins with `next_token_`.
            memory: `memory` of the result, whose layers and calibration statistics it takes; the same as here if None.
        """
        memory = memory if memory is not None else self.memory
        kept = {layer: rows for layer, rows in memory.layers.items() if layer in self}
        fit = fit_for(kept, options, _fits(memory))
        confidences = make_confidences(kept, options, fit)
        here = {layer: self[layer].rows for layer in kept}  # on the devices of the gates
        voting = make_voting(here, options, _next_tokens(memory, options), fit)
        lookups = {
            layer: self[layer].with_confidence(one, options, voting.get(layer)) for layer, one in confidences.items()
        }
        return AttachedMemory(memory, self.model, lookups, options)

    def with_rows_of(self, memory: RoutingMemory) -> "AttachedMemory":
        """Another memory for the same model, with the same options; neither fingerprint nor probe runs again."""
        return AttachedMemory.of(memory, self.model, self.options)

    def __deepcopy__(self, memo: dict) -> "AttachedMemory":
        # a copied model shares the memory's tensors instead of copying them
        lookups = {layer: copy.copy(lookup) for layer, lookup in self.items()}
        twin = AttachedMemory(self.memory, copy.deepcopy(self.model, memo), lookups, self.options)
        twin.owner = self.owner
        memo[id(self)] = twin
        return twin

    def __reduce__(self):
        return AttachedMemory, (self.memory, self.model, dict(self), self.options)


def _fits(memory: RoutingMemory) -> Mapping[str, RecallFit]:
    return memory.calibration.fits if memory.calibration is not None else {}


def _next_tokens(memory: RoutingMemory, options: RetrievalOptions) -> Tensor | None:
    """Those of a memory; None if the options do not recall any, as deriving them takes time."""
    return None if options.recall == "routing" else memory.next_tokens
