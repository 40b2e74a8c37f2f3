"""Scores the same examples with and without a memory.

Each batch runs both ways, in alternating order, so that a change of the machine's speed affects both times alike.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from knnmoe_hf.data.batches import as_list
from knnmoe_hf.evaluation.overlap import Overlap, without_overlap
from knnmoe_hf.evaluation.scores import Change, Scores, join_scores, paired_bootstrap, score
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.models.attach import disable_memory, get_memory, watch_lookups
from knnmoe_hf.models.hooks import fixed

logger = logging.getLogger(__name__)

_RECALL = -1  # beside the numbers of layers


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        base, memory: scores of the same examples.
        base_seconds, memory_seconds: wall time of all forward passes, in seconds.
        confidence: `{layer: mean confidence over the real tokens}`, by which the routing is changed.
        overlap: how many examples overlap the memory's references, and whether they were left out.
        texts: (n,) int64, the number of each example's text: the same for examples with the same tokens and labels.
        recall_confidence: the mean confidence in recalled next tokens, which may have a threshold of its own; None if
            none are recalled.
    """

    base: Scores
    memory: Scores
    base_seconds: float
    memory_seconds: float
    confidence: dict[int, float]
    overlap: Overlap
    texts: Tensor
    recall_confidence: float | None = None

    def change(self, metric: str = "nll") -> Change:
        """
        Change of the mean per token with its interval; `metric` as in `paired_bootstrap`.

        Examples that are there several times count as one window in the interval.
        """
        return paired_bootstrap(self.base, self.memory, metric, groups=self.texts)


def compare(
    model: nn.Module,
    rows: Sequence[dict],
    batch_size: int = 8,
    progress: str | None = None,
    allow_overlap: bool = False,
) -> Comparison:
    """
    Scores examples with the memory in force and without any.

    Examples whose text is among the memory's references, in any chunking, are left out (see
    `knnmoe_hf.evaluation.references`): what is gained there says nothing about other text. A warning says so if that
    could not be checked.

    Args:
        model: a causal language model with a memory in force.
        rows: as `prepare_dataset` returns them.
        batch_size: examples per forward pass.
        progress: label of a progress bar; None shows none.
        allow_overlap: score them all the same.

    Raises:
        ValueError: if no memory is attached, if no row has a target, or if the references hold every row.
    """
    with fixed(model):
        return _compare(model, rows, batch_size, progress, allow_overlap)


def _compare(
    model: nn.Module, rows: Sequence[dict], batch_size: int, progress: str | None, allow_overlap: bool
) -> Comparison:
    rows, overlap = without_overlap(get_memory(model), rows, allow_overlap)
    overlap.check_any_left()
    if overlap.windows and not overlap.checked:
        logger.warning(overlap.sentence())
    sums, tokens = defaultdict(float), defaultdict(int)  # by layer, and by `_RECALL`

    def record(event: LookupEvent) -> None:
        # summed up after the timing: `item` would wait for the device
        recorded.append((event.layer, event.confidence))
        if event.recalled is not None:
            recorded.append((_RECALL, event.recalled.confidences))

    parts: dict[bool, list[Scores]] = {True: [], False: []}
    seconds = {True: 0.0, False: 0.0}
    for start in tqdm(range(0, len(rows), batch_size), desc=progress, disable=progress is None, leave=False):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        real = sum(sum(row["attention_mask"]) for row in batch)
        for with_memory in (False, True) if (start // batch_size) % 2 else (True, False):
            recorded: list = []
            started = time.perf_counter()
            if with_memory:
                with watch_lookups(model, record):
                    parts[True].append(score(model, batch, batch_size))
            else:
                with disable_memory(model):
                    parts[False].append(score(model, batch, batch_size))
            seconds[with_memory] += time.perf_counter() - started
            for where, confidence in recorded:
                sums[where] += confidence.sum().item()
                tokens[where] += real
    base, memory = join_scores(parts[False]), join_scores(parts[True])
    if not base.tokens.sum():
        raise ValueError("no row has a target token, so there is nothing to compare: check the labels.")
    means = {where: sums[where] / tokens[where] for where in sorted(sums)}
    recalled = means.pop(_RECALL, None)
    return Comparison(base, memory, seconds[False], seconds[True], means, overlap, _texts(rows), recalled)


def _texts(rows: Sequence[dict]) -> Tensor:
    """(n,) int64, the same number for rows with the same tokens and labels."""
    numbers: dict[tuple, int] = {}
    contents = (tuple(tuple(as_list(rows[i][name])) for name in ("input_ids", "labels")) for i in range(len(rows)))
    return torch.tensor([numbers.setdefault(content, len(numbers)) for content in contents], dtype=torch.int64)
