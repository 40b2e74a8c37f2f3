"""Scores of a model on examples, and the change between two models with a confidence interval over examples."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from knnmoe_hf.data.batches import batches, target_mask
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.memory.verdict import LEAST_WINDOWS
from knnmoe_hf.models.hooks import fixed
from knnmoe_hf.models.modes import evaluating
from knnmoe_hf.models.offload import input_device

_DRAWN = 2**22  # drawn items that are in memory at once


@dataclass(frozen=True)
class Scores:
    """
    Sums over the targets of each of n examples.

    Attributes:
        nll: (n,) float64, in nats.
        hits: (n,) float64, number of targets to which the model gave the highest probability.
        tokens: (n,) float64, number of targets.
    """

    nll: Tensor
    hits: Tensor
    tokens: Tensor

    @property
    def mean_nll(self) -> float:
        """Mean NLL of the targets, in nats per token."""
        return (self.nll.sum() / self.tokens.sum()).item()

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL."""
        return torch.exp(self.nll.sum() / self.tokens.sum()).item()

    @property
    def accuracy(self) -> float:
        """Share of targets to which the model gave the highest probability."""
        return (self.hits.sum() / self.tokens.sum()).item()


@torch.no_grad()
def score(
    model: nn.Module,
    rows: Sequence[dict],
    batch_size: int = 8,
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """
    Scores examples with the model as it is, with the memory in force if there is one.

    Args:
        model: a causal language model; scored in eval mode, which is restored afterwards.
        rows: as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        progress: label of a progress bar; None shows none.
        processes: share the batches; every process must make this call, and gets the scores of all examples.
    """
    loader = batches(rows, batch_size, input_device(model))
    loader = tqdm(loader, desc=progress, total=-(-len(rows) // batch_size), disable=progress is None, leave=False)
    with fixed(model), evaluating(model):
        return join_scores(processes.map(loader, functools.partial(_score_batch, model)))


@torch.no_grad()
def score_kinds(
    model: nn.Module, texts: Mapping[str, Sequence[dict]], batch_size: int = 8, processes: Processes = ALONE
) -> dict[str, Scores]:
    """`score` of several kinds of text, `{kind: rows}`; the processes share the batches of all kinds together."""
    device = input_device(model)
    loader = ((kind, batch) for kind, rows in texts.items() for batch in batches(rows, batch_size, device))
    with fixed(model), evaluating(model):
        scored = processes.map(loader, lambda item: (item[0], _score_batch(model, item[1])))
    return {kind: join_scores([scores for other, scores in scored if other == kind]) for kind in texts}


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenates the scores of several batches."""
    empty = torch.zeros(0, dtype=torch.float64)
    names = ("nll", "hits", "tokens")
    return Scores(*(torch.cat([empty, *(getattr(part, name) for part in parts)]) for name in names))


class TokenScores(NamedTuple):
    """
    Scores of the n targets of a batch, on the CPU.

    Attributes:
        nll: (n,) float32, in nats.
        hits: (n,) bool, whether the model gave the target the highest probability.
        example: (n,) int64, place of the target's example in the batch.
        examples: number of examples of the batch.
    """

    nll: Tensor
    hits: Tensor
    example: Tensor
    examples: int

    def sums(self) -> Scores:
        """The sums over the targets of each example."""
        empty = torch.zeros(self.examples, dtype=torch.float64)
        values = (self.nll, self.hits, torch.ones_like(self.nll))
        return Scores(*(empty.index_add(0, self.example, one.double()) for one in values))


def score_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> TokenScores:
    """Scores the targets of one batch, as `batches` gives it, in one forward pass of the model as it is."""
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    targets = target_mask(labels, mask)
    if ids.shape[1] == 0:
        nothing = torch.zeros(0)
        return TokenScores(nothing, nothing.bool(), nothing.long(), len(ids))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[targets].float()  # (n, V)
    following = labels.roll(-1, dims=1)[targets]
    nll, hits = F.cross_entropy(logits, following, reduction="none"), logits.argmax(-1) == following
    return TokenScores(nll.cpu(), hits.cpu(), targets.nonzero(as_tuple=True)[0].cpu(), len(ids))


def _score_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
    return score_tokens(model, batch).sums()


@dataclass(frozen=True)
class Change:
    """
    Change of a mean per token.

    Attributes:
        mean: over all targets.
        low, high: bounds of its 95 % confidence interval; None if there are fewer than `LEAST_WINDOWS` windows.
        windows: different examples with a target; None if unknown.
    """

    mean: float
    low: float | None
    high: float | None
    windows: int | None = None

    def text(self, unit: float = 1, digits: int = 4) -> str:
        """The mean, in multiples of 1 / `unit`, and its interval, or "n/a" in place of that."""
        if self.low is None or self.high is None:
            return f"{unit * self.mean:+.{digits}f} [n/a]"
        mean, low, high = (f"{unit * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def paired_bootstrap(
    base: Scores,
    changed: Scores,
    metric: str = "nll",
    resamples: int = 2000,
    seed: int = 0,
    groups: Tensor | None = None,
) -> Change:
    """
    Change of the mean per token from `base` to `changed`, with a 95 % percentile bootstrap interval.

    Whole examples are resampled, each with both of its scores, because tokens of one text are not independent.
    Examples of one document are taken for independent, unless `groups` says otherwise: if all are of one, the interval
    is that on other parts of this document.

    Args:
        base, changed: scores of the same examples.
        metric: `"nll"` (nats per token) or `"hits"` (share of tokens).
        resamples: number of bootstrap samples.
        seed: random seed of the resampling.
        groups: (n,) int64, numbers of texts; examples of the same text count as one window. None if all differ.

    Returns:
        The change, without an interval if there are fewer than `LEAST_WINDOWS` windows with a target.

    Raises:
        ValueError: for another metric, for scores of different examples, if no example has a target, or for no
            resample.
    """
    if metric not in ("nll", "hits"):
        raise ValueError(f"metric={shown(metric)} is not allowed: choose one of nll, hits.")
    if not torch.equal(base.tokens, changed.tokens):
        sizes = f"{len(base.tokens)} and {len(changed.tokens)}"
        raise ValueError(f"scores of {sizes} examples do not pair: score the same rows twice.")
    if not base.tokens.sum():
        raise ValueError("no example has a target token, so there is nothing to compare: check the labels.")
    difference, tokens = getattr(changed, metric) - getattr(base, metric), base.tokens
    if groups is not None:
        of_row = groups.unique(return_inverse=True)[1]
        empty = torch.zeros(int(of_row.max()) + 1, dtype=torch.float64)
        difference, tokens = (empty.index_add(0, of_row, values) for values in (difference, tokens))
    return _mean_change(difference, tokens, resamples, seed)


def mean_change(before: Tensor, after: Tensor, resamples: int = 2000, seed: int = 0) -> Change:
    """
    Change of the mean over items, with the interval of `paired_bootstrap`: items are resampled with both values.

    Args:
        before, after: (n,) of the same items in the same order, such as 1 for a right answer and 0 for a wrong one.
        resamples, seed: as there.

    Returns:
        The change, without an interval if there are fewer than `LEAST_WINDOWS` items.

    Raises:
        ValueError: for different numbers of items, or for none, or for no resample.
    """
    if before.shape != after.shape or before.dim() != 1:
        sizes = f"{list(before.shape)} and {list(after.shape)}"
        raise ValueError(f"values of shapes {sizes} do not pair: give one number for each item, twice.")
    if not len(before):
        raise ValueError("there are no items, so there is nothing to compare: give at least one.")
    difference = after.double() - before.double()
    return _mean_change(difference, torch.ones_like(difference), resamples, seed)


def _mean_change(difference: Tensor, tokens: Tensor, resamples: int, seed: int) -> Change:
    if resamples < 1:
        raise ValueError(f"resamples={shown(resamples)} is not allowed: use a positive number.")
    counted = tokens > 0  # examples without targets are dropped, so that no resample is without targets
    difference, tokens = difference[counted], tokens[counted]
    mean, windows = (difference.sum() / tokens.sum()).item(), len(tokens)
    if windows < LEAST_WINDOWS:
        return Change(mean, None, None, windows)
    generator, means = torch.Generator().manual_seed(seed), []
    for start in range(0, resamples, step := max(1, _DRAWN // windows)):
        drawn = torch.randint(windows, (min(step, resamples - start), windows), generator=generator)
        means.append(difference[drawn].sum(-1) / tokens[drawn].sum(-1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(mean, low, high, windows)
