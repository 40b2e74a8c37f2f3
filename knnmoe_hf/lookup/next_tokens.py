"""
The tokens that followed the neighbours, mixed into the distribution of the next token.

kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172) gives the next token y the probability
`(1 - m) p_model(y) + m sum_i w_i [y = y_i]` over the nearest reference tokens i, after which y_i came. Here m is
multiplied by the memory's confidence c, so that a text unlike the references keeps the model's own distribution.

Tensors only: T tokens, V entries of the vocabulary, K neighbours, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from knnmoe_hf import native
from knnmoe_hf.lookup.mixing import neighbor_weights
from knnmoe_hf.lookup.options import RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.search.base import Neighbors

DEFAULT_WEIGHT, DEFAULT_TEMPERATURE, DEFAULT_NEIGHBORS = 0.35, 0.25, 64
"""Where nothing was fitted."""

_TINY = torch.finfo(torch.float32).tiny
_BELOW_ONE = 1 - torch.finfo(torch.float32).eps / 2  # the float32 before 1
_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # float32 values of a temporary table: 1 MiB stays in a CPU's cache


@dataclass(frozen=True)
class NextTokens:
    """
    How the neighbours of a memory's last layer vote for the next token.

    Attributes:
        token_ids: (N,) int32, the token that follows each row, on the layer's device.
        weight: m, from 0 to below 1.
        temperature: of the votes `softmax(-d / (temperature * s))`, positive.
        neighbors: how many rows vote.
        fit: by which the votes count, where a calibration has fitted that; None if they count `m c` for every token.
    """

    token_ids: Tensor
    weight: float
    temperature: float
    neighbors: int
    fit: RecallFit | None = None

    @classmethod
    def of(cls, token_ids: Tensor, options: RetrievalOptions, fit: RecallFit | None = None) -> "NextTokens":
        """With the options' values; where they name none, with those of the fit, or the defaults without one."""
        weight, temperature = DEFAULT_WEIGHT, DEFAULT_TEMPERATURE
        if fit is not None:
            weight, temperature = fit.next_token_weight, fit.next_token_temperature
        if options.next_token_weight is not None:
            weight, fit = float(options.next_token_weight), None
        if options.next_token_temperature is not None:
            temperature = float(options.next_token_temperature)
        return cls(token_ids, weight, temperature, voters_of(options), fit)

    def mixing_weight(self, confidence: Tensor, trust: Tensor) -> Tensor:
        """
        What the recalled distribution counts for each token: `m c`, or as `fitted_weight` says if that was fitted.

        Args:
            confidence: (T,) float32 in [0, 1], c of the last remembered layer.
            trust: (T,) float32 in [0, 1], see `trust`.

        Returns:
            (T,) float32 in [0, 1).
        """
        return self.weight * confidence if self.fit is None else fitted_weight(self.weight, confidence * trust)


def voters_of(options: RetrievalOptions) -> int:
    """How many neighbours vote."""
    return options.next_token_neighbors or DEFAULT_NEIGHBORS


def trust(votes: Tensor, chances: Tensor, nearest: Tensor) -> Tensor:
    """
    How far neighbours can be trusted to know the next token: `g = exp(-(H + d_1) / 2)`, with the entropy H of the
    recalled distribution in nats, which says how far they agree, and the distance d_1 of the nearest.

    Weights that hang on the neighbours are those of later kNN-LMs (He et al. 2021, arXiv 2109.04212; Drozdov et al.
    2022, arXiv 2210.15859); this form was found on held-out text (benchmarks/results).

    Args:
        votes: (T, K) float32, weights of the neighbours; rows sum to 1.
        chances: (T, K) float32, the sum of the votes for each neighbour's token, see `chances_of`.
        nearest: (T,) float32, squared L2 distance of the nearest, in units of the layer's scale.

    Returns:
        (T,) float32 in [0, 1]; 1 for neighbours that agree, the nearest of which is the query itself.
    """
    entropy = -(votes * chances.clamp_min(_TINY).log()).sum(dim=-1)
    return torch.exp((entropy + nearest) * -0.5).clamp_max(1.0)


def fitted_weight(weight: float, sure: Tensor) -> Tensor:
    """
    The mixing weight whose log odds are `logit(m) + logit(sure)`: `sure` itself for m = 0.5, nearer to 1 for more.

    Args:
        weight: m, from 0 to below 1.
        sure: (T,) float32 in [0, 1], confidence times trust; where it is 0, the weight is 0.

    Returns:
        (T,) float32 in [0, 1).
    """
    counted = weight * sure
    return (counted / (counted + (1 - weight) * (1 - sure)).clamp_min(_TINY)).clamp_max(_BELOW_ONE)


class RecalledTokens(NamedTuple):
    """
    What the last remembered layer leaves for the output embeddings. Nothing is computed before it is known of which
    tokens logits are wanted.

    Attributes:
        next_tokens: how the neighbours vote.
        neighbors: distances and rows, (T, K) each.
        confidence: (T,) float32, or a float for a single token.
        scale: s, the unit of distance of the layer.
    """

    next_tokens: NextTokens
    neighbors: Neighbors
    confidence: Tensor | float
    scale: float

    def at(self, places: Tensor) -> "RecalledTokens":
        """Those of some of the tokens, by index (T',)."""
        distances, rows = self.neighbors
        places, confidence = places.to(rows.device), self.confidence
        if isinstance(confidence, Tensor):
            confidence = confidence.index_select(0, places)
        return self._replace(
            neighbors=Neighbors(distances.index_select(0, places), rows.index_select(0, places)), confidence=confidence
        )

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.neighbors.rows)

    def votes(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """
        The recalled distribution on a device: token ids (T, K) int64, the probability of each (T, K) float32, equal
        for equal ids, and what the distribution counts (T,) float32.
        """
        distances, rows = self.neighbors
        how = self.next_tokens
        ids = how.token_ids[rows].long()
        votes = neighbor_weights(distances, self.scale, how.temperature)
        chances = chances_of(ids, votes)
        confidence = torch.as_tensor(self.confidence, dtype=torch.float32, device=rows.device).expand(len(rows))
        weight = how.mixing_weight(confidence, trust(votes, chances, distances[:, 0] / self.scale))
        return ids.to(device), chances.to(device), weight.to(device).detach()


def chances_of(ids: Tensor, votes: Tensor) -> Tensor:
    """The recalled distribution: for each of ids (T, K), the sum of the votes (T, K) of all that equal it."""
    return _by_rows(_sum_of_equals, ids.shape[1] ** 2, ids, votes)


def _sum_of_equals(ids: Tensor, votes: Tensor) -> Tensor:
    return torch.where(ids[:, :, None] == ids[:, None, :], votes[:, None, :], 0.0).sum(-1)


def _by_rows(function: Callable[..., Tensor], width: int, *tables: Tensor) -> Tensor:
    """
    A function of tables of T rows each, computed a part of the rows at a time, so that its temporary tables of `width`
    float32 values a row stay small. A compiler fuses them anyway, and would take the number of parts as fixed.
    """
    step = max(1, _AT_ONCE.get(tables[0].device.type, 2**22) // width)
    if _is_traced() or len(tables[0]) <= step:
        return function(*tables)
    return torch.cat([function(*parts) for parts in zip(*(table.split(step) for table in tables))])


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclass(frozen=True)
class LogitsTransform:
    """
    From what a model's output embeddings return to the logits that the model returns: the first `width` entries,
    times `factor`, then `cap * tanh(x / cap)` if there is a cap.

    Attributes:
        width: number of entries of the model's logits.
        factor: positive.
        cap: positive, or None.
    """

    width: int
    factor: float = 1.0
    cap: float | None = None

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
            logits = torch.atanh((logits / self.cap).clamp(-_BELOW_ONE, _BELOW_ONE)) * self.cap
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
    ids, chances, weight = recalled.votes(output.device)
    if output.device.type == "cpu" and not _is_traced() and not bool((weight > 0).any()):
        return output
    own = output.gather(1, ids)  # (T, K)
    total = _log_totals(output, weight, transform)
    # what is not mixed is computed all the same, with finite logarithms: its gradient is 0 and must not be 0 * inf
    odds = weight.clamp_min(_TINY).log() - (-weight).log1p()
    mixed = torch.logaddexp(transform(own.float()), (odds + total)[:, None] + chances.clamp_min(_TINY).log())
    chosen = (weight[:, None] > 0) & (chances > 0)
    new = torch.where(chosen, transform.inverse(mixed).to(output.dtype), own)
    places = torch.arange(len(ids), device=ids.device)[:, None], ids  # `scatter` is slow in bfloat16
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output.index_put_(places, new)
    # equal ids are written several times: the gradient goes through the first
    return output.index_put(places, torch.where(_is_first(ids), new, new.detach()))


def _log_totals(output: Tensor, weight: Tensor, transform: LogitsTransform) -> Tensor:
    """(T,) float32, the log sum exp of the logits; whatever is finite where the weight is 0."""
    kernels = native.on(output.device)
    if kernels is None or _is_traced() or not _is_readable(output):

        def log_total(rows: Tensor) -> Tensor:
            return transform(rows[:, : transform.width].float()).logsumexp(dim=-1)

        return _by_rows(log_total, output.shape[1], output)
    weight, totals = weight.contiguous(), torch.empty(len(output), dtype=torch.float32, device="cpu")
    kernels.log_totals(
        native.address(output, output.dtype),
        native.address(weight, torch.float32),
        *output.shape,
        transform.width,
        native.kinds()[output.dtype],
        transform.factor,
        transform.cap or 0.0,
        totals.data_ptr(),
        torch.get_num_threads(),
    )
    return totals


def _is_readable(output: Tensor) -> bool:
    """Whether native code can compute what is wanted of outputs of the output embeddings."""
    if torch.is_grad_enabled() and output.requires_grad:
        return False
    return native.is_plain(output) and output.is_contiguous() and output.dtype in native.kinds()


def _is_first(ids: Tensor) -> Tensor:
    """(T, K) bool: whether no equal id stands before this one."""
    first = _by_rows(lambda some: (some[:, :, None] == some[:, None, :]).int().argmax(-1), ids.shape[1] ** 2, ids)
    return first == torch.arange(ids.shape[1], device=ids.device)
