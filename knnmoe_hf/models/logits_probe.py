"""A test forward that shows what a model does with the output of its output embeddings, and which tokens they get."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from knnmoe_hf.errors import MemoryMismatchError, UnsupportedModelError
from knnmoe_hf.lookup.logits import LogitsTransform
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.gates import find_decoder, find_gates
from knnmoe_hf.models.hooks import using_overrides
from knnmoe_hf.models.logits_hook import find_language_model, takes_logits_to_keep
from knnmoe_hf.models.probe import ProbedModel, here_only, probe_model, run_padded_batch

_KEPT = 3  # tokens of each sequence of which logits are asked for
_SMALL, _LARGE = 1e-3, 1e6  # outputs that no cap bends, and that any cap cuts


def probe_for(model: nn.Module, memory: RoutingMemory, recall: str) -> ProbedModel:
    """
    What is to be known of the model for this `recall`: of its gates, and of its output embeddings where next tokens
    are recalled.

    Raises:
        UnsupportedModelError: if an override would not decide the routing, or recalled tokens not the logits.
        MemoryMismatchError: if next tokens of the memory are not in the model's vocabulary.
    """
    probed = probe_model(model)
    if recall != "routing":
        probed = replace(probed, logits=probe_logits(model))
        check_vocabulary(memory.next_tokens, probed.logits)
    return probed


def probe_logits(model: nn.Module) -> LogitsTransform:
    """
    Runs a batch of two sequences through a language model, with made-up numbers as what its output embeddings return.

    They must run once, on what the decoder returned for the tokens of which logits were asked for, and the model's
    logits must be a known function of what they return.

    Raises:
        UnsupportedModelError: saying what is different, and what to do.
    """
    decoder = find_decoder(model, find_gates(model))
    language_model = find_language_model(model, decoder)
    if language_model is None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no output embeddings, so it has no distribution of next tokens to mix "
            "recalled ones into: give the language model with its head (AutoModelForCausalLM), or use "
            "recall='routing'."
        )
    seen, logits = _observed(model, language_model, decoder)
    if len(seen.inputs) != 1:
        raise _unsupported(language_model, f"its output embeddings ran {len(seen.inputs)} times in one forward")
    keep = _KEPT if takes_logits_to_keep(language_model) is not None else 0
    given = seen.inputs[0].float()
    wanted = seen.hidden[:, -keep:].to(given.device, torch.float32)
    if given.shape != wanted.shape or F.cosine_similarity(given, wanted, dim=-1).min() < 0.99:
        raise _unsupported(language_model, "its output embeddings do not get what its decoder returned")
    transform = _fitted(seen.outputs, logits)
    if transform is None:
        raise _unsupported(
            language_model,
            "its logits are neither the output of its output embeddings, nor that times a number or below a soft cap",
        )
    return transform


def check_vocabulary(next_tokens: Tensor, transform: LogitsTransform) -> None:
    """
    Checks that a model's logits have an entry for each token that a memory's rows (N,) recall.

    Raises:
        MemoryMismatchError: if they do not.
    """
    if len(next_tokens) and (largest := int(next_tokens.max())) >= transform.width:
        raise MemoryMismatchError(
            f"this memory recalls the token {largest}, and the model has logits of {transform.width} tokens: attach "
            "it to the model for which it was built, or use recall='routing'."
        )


class _Seen:
    """What was seen of the decoder and the output embeddings."""

    def __init__(self):
        self.hidden: Tensor | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Tensor | None = None

    def decoded(self, decoder: nn.Module, args: tuple, output) -> None:
        self.hidden = output[0].detach()

    def replaced(self, head: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self.inputs.append(args[0].detach())
        numbers = torch.linspace(-1, 1, output.numel() - output.shape[-1], dtype=torch.float64, device="cpu")
        rows = numbers.view(-1, output.shape[-1]) * 64
        rows[0] *= _SMALL
        rows = torch.cat([rows, _LARGE * rows[:1].sign()]).float()
        self.outputs = rows.to(output.device)
        return self.outputs.clone().view(output.shape)


def _observed(model: nn.Module, language_model: PreTrainedModel, decoder: PreTrainedModel) -> tuple[_Seen, Tensor]:
    """What was seen in a forward of the language model, and its logits."""
    seen = _Seen()
    head = language_model.get_output_embeddings()
    handles = [
        decoder.register_forward_hook(here_only(seen.decoded)),
        head.register_forward_hook(here_only(seen.replaced)),
    ]
    kept = {"logits_to_keep": _KEPT} if takes_logits_to_keep(language_model) is not None else {}
    try:
        with using_overrides(model, Overrides({})):
            return seen, run_padded_batch(model, language_model, decoder, return_dict=True, **kept).logits
    finally:
        for handle in handles:
            handle.remove()


def _fitted(outputs: Tensor, logits: Tensor) -> LogitsTransform | None:
    """The transform of outputs (n, V) to logits (..., <= V); the first row has small numbers, the last large ones."""
    logits = logits.reshape(-1, logits.shape[-1]).float().to(outputs.device)
    width = logits.shape[-1]
    if len(logits) != len(outputs) or not 0 < width <= outputs.shape[-1]:
        return None
    left_out, outputs = outputs.shape[-1] - width, outputs[:, :width]
    factor, cap = (logits[0] / outputs[0]).median().item(), logits[-1].abs().median().item()
    factor = 1.0 if abs(factor - 1) < 1e-5 else factor
    fitted = LogitsTransform(width, factor, None if cap > 0.5 * factor * _LARGE else cap, left_out)
    close = torch.isclose(fitted(outputs), logits, rtol=1e-4, atol=1e-6)
    return fitted if factor > 0 and bool(close.all()) else None


def _unsupported(model: nn.Module, difference: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"next tokens cannot be recalled in this {type(model).__name__}, because {difference}: use recall='routing', "
        "or the class of transformers for this model, unpatched."
    )
