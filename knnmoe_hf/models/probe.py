"""A test forward that checks that routing overrides on a model's gates really decide its routing."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.logits import LogitsTransform
from knnmoe_hf.lookup.rules import GateOutput, Router, RoutingRule
from knnmoe_hf.lookup.sequence import Tokens
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.gate_watch import GateWatch
from knnmoe_hf.models.gates import Gate, find_decoder, find_gates, weights_of
from knnmoe_hf.models.hooks import hooked
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import as_in_forward, input_device, modules_around
from knnmoe_hf.models.trained_gates import TrainedGates

_LENGTH, _PADDING = 8, 3  # tokens of a probe sequence, and how many of them are padding in the second one
# without this, a config that asks for these outputs makes transformers put permanent recording hooks on the model
_NO_OUTPUTS = dict(output_router_logits=False, output_hidden_states=False, output_attentions=False)
_probing: ContextVar[bool] = ContextVar("knnmoe_hf_probing", default=False)


@dataclass(frozen=True)
class ProbedModel:
    """
    What attaching needs to know of a model that passed the probe.

    It holds nothing of the model itself: a copy of the model has it too.

    Attributes:
        routers: `{layer: the model's own routing rule and width}`, in the order of the layers.
        devices: `{layer: device on which the gate runs}`.
        watches: `{layer: the gate as it is now}`.
        logits: what the model does with the output of its output embeddings, see `probe_logits`; None if that was not
            probed, and next tokens cannot be recalled.
    """

    routers: dict[int, Router]
    devices: dict[int, torch.device]
    watches: dict[int, GateWatch]
    logits: LogitsTransform | None = None

    def __deepcopy__(self, memo: dict) -> "ProbedModel":
        return replace(self, watches={layer: copy.copy(watch) for layer, watch in self.watches.items()})


def probe_model(model: nn.Module) -> ProbedModel:
    """
    Runs a padded batch of two sequences through the model's decoder with an override on each gate.

    Every gate must run exactly once, its family's rule must reproduce its weights and expert ids exactly from its
    logits, and the call's tokens, padding included, must arrive at it.

    Raises:
        UnsupportedModelError: naming the module and what to do.
    """
    gates = find_gates(model)
    decoder = find_decoder(model, gates)
    _check_loaded(model, decoder)
    trained_gates = TrainedGates()
    seen = {gate.layer: _Seen(trained_gates) for gate in gates}
    handles = [handle for gate in gates for handle in seen[gate.layer].record(gate)]
    try:
        with hooked(model) as hooks, hooks.using(Overrides({layer: one.route for layer, one in seen.items()})):
            run_padded_batch(model, decoder, decoder)
    except UnsupportedModelError:
        # tokens at each gate that ran: a gate that did not run is the reason
        arrived = all((one.tokens is None) == (one.runs == 0) for one in seen.values())
        for gate in gates:
            if seen[gate.layer].runs > 1 or arrived:  # a second run finds no tokens
                _check_runs(model, gate, seen[gate.layer].runs)
        raise
    finally:
        for handle in handles:
            handle.remove()
    for gate in gates:
        one = seen[gate.layer]
        _check_runs(model, gate, one.runs)
        _check_output(gate, one.router.rule, one.output)
        _check_tokens(gate, one.tokens)
    return ProbedModel(
        {layer: one.router for layer, one in seen.items()},
        {layer: one.device for layer, one in seen.items()},
        {layer: one.watch for layer, one in seen.items()},
    )


class _Seen:
    """What was seen of one gate."""

    runs = 0
    tokens: Tokens | None = None
    output: object = None
    device: torch.device
    router: Router
    watch: GateWatch | None = None

    def __init__(self, trained_gates: TrainedGates):
        self.trained_gates = trained_gates

    def record(self, gate: Gate) -> list:
        """Puts hooks on the gate; returns their handles."""
        module = gate.module

        def began(*_) -> None:
            self.runs += 1

        def ran(_, args: tuple, output: object) -> None:
            with weights_of(gate):
                rule = gate.current_rule().to(args[0].device)
            self.router = Router(rule, gate.top_k)
            if _is_routing(output):
                self.watch = GateWatch(gate.layer, module, args, self.router, self.trained_gates)

        def returned(_, args: tuple, output: object) -> None:
            self.device, self.output = args[0].device, output

        return [
            module.register_forward_pre_hook(here_only(began)),
            # first of all: FSDP's own hook, if there is one, has not yet taken the weights away
            module.register_forward_hook(here_only(ran), prepend=True),
            module.register_forward_hook(here_only(returned)),  # last of all, so that it sees what other hooks return
        ]

    def route(self, x: Tensor, output: GateOutput, tokens: Tokens) -> None:
        """The override: keeps the gate's own routing."""
        self.tokens = tokens


def here_only(record: Callable) -> Callable:
    """A hook for this thread alone: others may run the model meanwhile."""
    thread = threading.get_ident()

    def record_here(*given):
        if torch.compiler.is_compiling() or threading.get_ident() == thread:
            return record(*given)

    return record_here


def _is_routing(output: object) -> bool:
    return isinstance(output, tuple) and len(output) == 3


def is_probing() -> bool:
    """Whether the calling thread or task runs a test forward, which nobody asked for who watches the model."""
    return _probing.get()


@contextmanager
def _test_forward() -> Iterator[None]:
    token = _probing.set(True)
    try:
        yield
    finally:
        _probing.reset(token)


@torch.no_grad()
def run_padded_batch(model: nn.Module, part: PreTrainedModel, decoder: PreTrainedModel, **arguments):
    """
    Runs a part of a model, its decoder or a language model around that, over a padded batch of two sequences.

    Args:
        model: the whole.
        part: a module of it.
        decoder: likewise.
        arguments: of the part's forward, beside the tokens.

    Returns:
        What the part returns.
    """
    around = modules_around(model, next(name for name, module in model.named_modules() if module is part))
    with evaluating(part), as_in_forward(around), _test_forward():
        # FSDP gathers the weights of a model that is sharded as a whole only in that model's own forward
        sharded = next((module for module in around if isinstance(module, FSDPModule)), part)
        return sharded(**_padded_batch(model, decoder), **arguments)


def _padded_batch(model: nn.Module, decoder: PreTrainedModel) -> dict:
    ids = torch.arange(2 * _LENGTH, device=input_device(model, decoder)).view(2, _LENGTH) % decoder.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, -_PADDING:] = 0
    paging = _without_paging(decoder, mask) if decoder.config._attn_implementation == "paged|eager" else {}
    return {"input_ids": ids, "attention_mask": mask, **paging, "use_cache": False, **_NO_OUTPUTS}


class _NoCache:
    """In place of a paged cache: nothing was cached, so a layer attends to its own keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _without_paging(decoder: PreTrainedModel, mask: Tensor) -> dict:
    """
    Arguments with which a decoder whose attention expects a paged cache runs without one.

    The configuration is left as it is: requests of another thread may be running.
    """
    attend = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None].bool()
    additive = torch.zeros(attend.shape, dtype=decoder.dtype, device=mask.device)
    return dict(attention_mask=additive.masked_fill(~attend, torch.finfo(decoder.dtype).min), cache=_NoCache())


def _check_loaded(model: nn.Module, decoder: PreTrainedModel) -> None:
    if input_device(model, decoder).type == "meta":
        raise UnsupportedModelError(
            f"this {type(model).__name__} is on the meta device and has no weights there: load it with "
            "from_pretrained, and offload it with accelerate (device_map, disk_offload) if it is too large."
        )


def _check_runs(model: nn.Module, gate: Gate, runs: int) -> None:
    if runs != 1:
        block = type(model.get_submodule(gate.name.rpartition(".")[0])).__name__
        raise UnsupportedModelError(
            f"the gate {gate.name} ran {runs} times in one forward where once is expected: its block {block} does its "
            "own routing, so load the model with Mxfp4Config(dequantize=True) and without use_kernels, or set "
            "`experts._is_hooked = True` on an Mxfp4GptOssMLP (transformers >= 5.23)."
        )


def _check_output(gate: Gate, rule: RoutingRule, output: object) -> None:
    if not _is_routing(output):
        raise UnsupportedModelError(
            f"the gate {gate.name} returned {type(output).__name__} where (logits, weights, expert ids) is expected: "
            "use transformers 5.23 or newer."
        )
    logits, weights, ids = output
    own = rule.routed(logits, gate.top_k, weights.dtype)
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(own, (weights, ids))):
        raise UnsupportedModelError(
            f"the gate {gate.name} does not follow the rule {rule.name} of its family, because of a patch or "
            "of this version of transformers: use an unpatched model with transformers 5.23 or newer."
        )


def _check_tokens(gate: Gate, tokens: Tokens) -> None:
    if tokens.shape != (2, _LENGTH) or tokens.real is None or int((~tokens.real).sum()) != _PADDING:
        raise UnsupportedModelError(
            f"the gate {gate.name} ran on {list(tokens.shape)} tokens of which the padding is unknown, in a padded "
            f"batch of 2 sequences of {_LENGTH}: use a model that passes its attention_mask to the decoder, as "
            "transformers 5.23 does."
        )
