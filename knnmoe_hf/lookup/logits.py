"""
Recalled next tokens mixed into the logits of a model.

Tensors only: T tokens, V entries of the vocabulary, K neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup.mixing import BELOW_ONE, TINY
from knnmoe_hf.lookup.next_tokens import RecalledTokens
from knnmoe_hf.lookup.parts import by_rows, is_traced


@dataclass(frozen=True)
class LogitsTransform:
    """
    From what a model's output embeddings return to the logits that the model returns: the first `width` entries,
    times `factor`, then `cap * tanh(x / cap)` if there is a cap.

    Attributes:
        width: number of entries of the model's logits.
        factor: positive.
        cap: positive, or None.
        left_out: number of outputs after the first `width`, which the model leaves out.
    """

    width: int
    factor: float = 1.0
    cap: float | None = None
    left_out: int = 0

    @property
    def outputs(self) -> int:
        """V, the number of outputs."""
        return self.width + self.left_out

    def __call__(self, x: Tensor) -> Tensor:
        """Float32 outputs as logits, of any shape."""
        if self.factor != 1.0:
            x = x * self.factor
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap

    def inverse(self, logits: Tensor) -> Tensor:
        """
        Float32 outputs that give these logits.

        Logits at or above the cap become the largest below it: no output gives them, so that a recalled token gets a
        smaller share than it should. That takes a model whose log normaliser lies near the cap, as many of its own
        logits then do.
        """
        if self.cap is not None:
            logits = torch.atanh((logits / self.cap).clamp(-BELOW_ONE, BELOW_ONE)) * self.cap
        return logits if self.factor == 1.0 else logits / self.factor


def mix_next_tokens(output: Tensor, recalled: RecalledTokens, transform: LogitsTransform) -> Tensor:
    """
    The model's distribution mixed with the recalled one, `(1 - w) p_model + w p_recalled`, as logits.

    Only the recalled entries change: `logit_y <- logaddexp(logit_y, log(w / (1 - w)) + log p_recalled(y) +
    logsumexp(logits))`, which leaves the others' ratios as they are. It is computed in float32 for the logits that
    the model will return, and turned back through `transform`.

    Args:
        output: (T, V) of the output embeddings, float32, bfloat16 or float16. Written in place unless it is part of a
            graph of gradients, which then go through the mixing.
        recalled: of the T tokens.
        transform: what the model does with the output.

    Returns:
        (T, V) in the dtype of `output`. Tokens of weight 0, and entries that were not recalled, keep their bits.
    """
    if _is_native(output, recalled):
        _mix_natively(output, recalled, transform)
        return output
    ids, probabilities, weight = recalled.weighted(output.device)
    if output.device.type == "cpu" and not is_traced() and not bool((weight > 0).any()):
        return output
    own = output.gather(1, ids)  # (T, K)
    total = by_rows(lambda rows: _log_total(rows, transform), output.shape[1], output)
    # what is not mixed is computed all the same, with finite logarithms: its gradient is 0 and must not be 0 * inf
    log_odds = weight.clamp_min(TINY).log() - (-weight).log1p()
    recalled_logits = (log_odds + total)[:, None] + probabilities.clamp_min(TINY).log()
    mixed = torch.logaddexp(transform(own.float()), recalled_logits)
    chosen = (weight[:, None] > 0) & (probabilities > 0)
    new = torch.where(chosen, transform.inverse(mixed).to(output.dtype), own)
    places = torch.arange(len(ids), device=ids.device)[:, None], ids  # `scatter` is slow in bfloat16
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output.index_put_(places, new)
    # equal ids are written several times: the gradient goes through the first
    return output.index_put(places, torch.where(_is_first(ids), new, new.detach()))


def _log_total(rows: Tensor, transform: LogitsTransform) -> Tensor:
    # as `logsumexp`, which asks a graph whether there are any rows, and a graph may not know their number
    logits = transform(rows[:, : transform.width].float())
    largest = logits.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    return (logits - largest).exp().sum(dim=-1).log() + largest[:, 0]


def _mix_natively(output: Tensor, recalled: RecalledTokens, transform: LogitsTransform) -> None:
    """In one call, in place: a step of decoding would spend more time between PyTorch's operations than in them."""
    voting, (distances, rows) = recalled.voting, recalled.voters
    distances, rows, confidence = distances.contiguous(), rows.contiguous(), recalled.confidence
    of_each = confidence.contiguous() if isinstance(confidence, Tensor) else None
    native.kernels.mix_next_tokens(
        native.address(output, output.dtype),
        *output.shape,
        native.kinds()[output.dtype],
        transform.width,
        transform.factor,
        transform.cap or 0.0,
        native.address(distances, torch.float32),
        native.address(rows, torch.int64),
        rows.shape[1],
        0 if of_each is None else native.address(of_each, torch.float32),
        0.0 if of_each is not None else confidence,
        native.address(voting.next_tokens, torch.int32),
        len(voting.next_tokens),
        max(voting.temperature * recalled.scale, TINY),
        recalled.scale,
        voting.weight,
        voting.fit is not None,
        torch.get_num_threads(),
    )


def _is_native(output: Tensor, recalled: RecalledTokens) -> bool:
    """Whether native code can mix these."""
    if native.on(output.device) is None or is_traced() or (torch.is_grad_enabled() and output.requires_grad):
        return False
    (distances, rows), next_tokens = recalled.voters, recalled.voting.next_tokens
    readable = native.is_plain(output, distances, rows, next_tokens) and rows.is_cpu and next_tokens.is_contiguous()
    return readable and output.is_contiguous() and output.dtype in native.kinds()


def _is_first(ids: Tensor) -> Tensor:
    """(T, K) bool: whether no equal id stands before this one."""
    first = by_rows(lambda some: (some[:, :, None] == some[:, None, :]).int().argmax(-1), ids.shape[1] ** 2, ids)
    return first == torch.arange(ids.shape[1], device=ids.device)
