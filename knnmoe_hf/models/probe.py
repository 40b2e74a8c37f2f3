"""A test forward that checks that routing overrides on a model's gates really decide its routing."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.rules import Router
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.gates import Gate, find_decoder, find_gates
from knnmoe_hf.models.hooks import hooked
from knnmoe_hf.models.modes import evaluating

_LENGTH, _PADDING = 8, 3  # tokens of a probe sequence, and how many of them are padding in the second one
# without this, a config that asks for these outputs makes transformers put permanent recording hooks on the model
_NO_OUTPUTS = dict(output_router_logits=False, output_hidden_states=False, output_attentions=False)


@dataclass(frozen=True)
class ProbedModel:
    """
    What attaching needs to know of a model that passed the probe.

    Attributes:
        gates: all gates, in the order of the layers.
        devices: `{layer: device on which the gate runs}`.
    """

    gates: list[Gate]
    devices: dict[int, torch.device]

    @property
    def routers(self) -> dict[int, Router]:
        """`{layer: the model's own routing rule and width}`."""
        return {gate.layer: Router(gate.rule, gate.top_k) for gate in self.gates}


def probe_model(model: nn.Module) -> ProbedModel:
    """
    Runs a padded batch of two sequences through the model's decoder with an override on each gate.

    Every gate must run exactly once, its family's rule must reproduce its weights and expert ids exactly from its
    logits, and the call's tokens, padding included, must arrive at it.

    Raises:
        UnsupportedModelError: naming the module and what to do.
    """
    gates = find_gates(model)
    outputs: dict[int, list[tuple[torch.device, object]]] = {gate.layer: [] for gate in gates}
    tokens: dict[int, Tokens] = {}
    runs: Counter[int] = Counter()

    def record_output(layer: int):  # registered last: sees the output after all other hooks on the gate
        return lambda _, args, output: outputs[layer].append((args[0].device, output))

    def record_tokens(layer: int):  # an override that returns None, so that the routing stays
        return lambda x, output, call_tokens: tokens.update({layer: call_tokens})

    handles = [gate.module.register_forward_hook(record_output(gate.layer)) for gate in gates]
    for gate in gates:
        handles.append(gate.module.register_forward_pre_hook(lambda *_, layer=gate.layer: runs.update([layer])))
    try:
        with hooked(model) as hooks, hooks.using(Overrides({layer: record_tokens(layer) for layer in outputs})):
            _run(find_decoder(model, gates))
    except UnsupportedModelError:
        arrived = set(tokens) == set(runs)  # tokens at each gate that ran: a gate that did not run is the reason
        for gate in gates:
            if runs[gate.layer] > 1 or arrived:  # a second run finds no tokens
                _check_runs(model, gate, runs[gate.layer])
        raise
    finally:
        for handle in handles:
            handle.remove()
    for gate in gates:
        _check_runs(model, gate, runs[gate.layer])
        _check_output(gate, outputs[gate.layer][0][1])
        _check_tokens(gate, tokens[gate.layer])
    return ProbedModel(gates, {layer: device for layer, ((device, _),) in outputs.items()})


@torch.no_grad()
def _run(decoder: PreTrainedModel) -> None:
    embedding = decoder.get_input_embeddings().weight
    device = decoder.device if embedding.device.type == "meta" else embedding.device
    ids = torch.arange(2 * _LENGTH, device=device).view(2, _LENGTH) % embedding.shape[0]
    mask = torch.ones_like(ids)
    mask[1, -_PADDING:] = 0
    with evaluating(decoder):
        decoder(ids, attention_mask=mask, use_cache=False, **_NO_OUTPUTS)


def _check_runs(model: nn.Module, gate: Gate, runs: int) -> None:
    if runs != 1:
        block = type(model.get_submodule(gate.name.rpartition(".")[0])).__name__
        raise UnsupportedModelError(
            f"the gate {gate.name} ran {runs} times in one forward where once is expected: its block {block} does its "
            "own routing, so load the model with Mxfp4Config(dequantize=True) and without use_kernels, or set "
            "`experts._is_hooked = True` on an Mxfp4GptOssMLP (transformers >= 5.23)."
        )


def _check_output(gate: Gate, output: object) -> None:
    if not (isinstance(output, tuple) and len(output) == 3):
        raise UnsupportedModelError(
            f"the gate {gate.name} returned {type(output).__name__} where (logits, weights, expert ids) is expected: "
            "use transformers 5.23 or newer."
        )
    logits, weights, ids = output
    own = gate.rule.routed(logits, gate.top_k, weights.dtype)
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, (weights, ids))):
        raise UnsupportedModelError(
            f"the gate {gate.name} does not follow the rule {gate.rule.name} of its family, because of a patch or "
            "of this version of transformers: use an unpatched model with transformers 5.23 or newer."
        )


def _check_tokens(gate: Gate, tokens: Tokens) -> None:
    if tokens.shape != (2, _LENGTH) or tokens.real is None or int((~tokens.real).sum()) != _PADDING:
        raise UnsupportedModelError(
            f"the gate {gate.name} ran on {list(tokens.shape)} tokens of which the padding is unknown, in a padded "
            f"batch of 2 sequences of {_LENGTH}: use a model that passes its attention_mask to the decoder, as "
            "transformers 5.23 does."
        )
