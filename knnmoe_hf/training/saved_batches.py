"""What a build knows of its batches beside keys and values, as the small tensors of a segment, and back."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.lookup.blocks import all_finite
from knnmoe_hf.training.progress import MEANS, BatchMetrics
from knnmoe_hf.training.rows import BatchFacts
from knnmoe_hf.training.segments import Segment, broken


def tensors_of(metrics: Sequence[BatchMetrics], facts: Sequence[BatchFacts]) -> dict[str, Tensor]:
    """
    The tensors of a segment that are neither keys nor values.

    Args:
        metrics: of consecutive batches.
        facts: of those of them that have rows, in the same order.
    """
    of = {batch.number: batch for batch in facts}
    examples = [of[one.number].examples if one.number in of else {} for one in metrics]
    ids = [example for batch in examples for example in batch]
    tokens = [both for batch in examples for both in batch.values()]  # (2, length) each
    columns = list(zip(*(batch.rows for batch in facts))) or [()] * 4
    return {
        "batches.rows": torch.tensor([one.rows for one in metrics], dtype=torch.int64),
        "batches.examples": torch.tensor([len(batch) for batch in examples], dtype=torch.int64),
        "batches.seconds": torch.tensor([one.seconds for one in metrics], dtype=torch.float64),
        "batches.means": torch.tensor(
            [[one.means.get(name, 0.0) for name in MEANS] for one in metrics], dtype=torch.float64
        ).view(-1, len(MEANS)),
        "rows.example_ids": _joined(columns[0], torch.int64),
        "rows.positions": _joined(columns[1], torch.int64),
        "rows.nll_before": _joined(columns[2], torch.float32),
        "rows.nll_after": _joined(columns[3], torch.float32),
        "examples.ids": torch.tensor(ids, dtype=torch.int64),
        "examples.lengths": torch.tensor([both.shape[1] for both in tokens], dtype=torch.int64),
        "examples.input_ids": _joined([both[0] for both in tokens], torch.int32),
        "examples.labels": _joined([both[1] for both in tokens], torch.int32),
    }


def batches_of(segment: Segment, first: int, vocab_size: int) -> tuple[list[BatchMetrics], list[BatchFacts]]:
    """
    The batches of a segment, after all that it holds was checked.

    Args:
        segment: to read.
        first: number of its first batch.
        vocab_size: token ids must be smaller.

    Raises:
        MemoryFileError: if its tensors do not fit each other, or have values that no build gives.
    """
    found = {name: segment.tensor(name) for name in segment.sizes.tensors() if not name.startswith(("keys", "values"))}
    _check(segment, found, vocab_size)
    lengths, examples = found["examples.lengths"].tolist(), found["batches.examples"].tolist()
    tokens = torch.stack([found["examples.input_ids"], found["examples.labels"]]).split(lengths, dim=1)
    ids, ends = found["examples.ids"].tolist(), [0, *accumulate(examples)]
    counts = found["batches.rows"].tolist()
    rows = [found[f"rows.{name}"].split(counts) for name in ("example_ids", "positions", "nll_before", "nll_after")]
    metrics, facts = [], []
    for place, count in enumerate(counts):
        means = dict(zip(MEANS, found["batches.means"][place].tolist())) if count else {}
        metrics.append(BatchMetrics(first + place, count, found["batches.seconds"][place].item(), means))
        if count:
            part = slice(ends[place], ends[place + 1])
            batch = BatchFacts(first + place, tuple(one[place] for one in rows), dict(zip(ids[part], tokens[part])))
            _check_batch(segment, batch, examples[place])
            facts.append(batch)
    return metrics, facts


def _check(segment: Segment, found: dict[str, Tensor], vocab_size: int) -> None:
    sizes = segment.sizes
    totals = {"batches.rows": sizes.rows, "batches.examples": sizes.examples, "examples.lengths": sizes.tokens}
    for name, total in totals.items():
        # one by one first, so that no sum of large numbers can wrap around
        if bool(((found[name] < 0) | (found[name] > total)).any()) or int(found[name].sum()) != total:
            raise broken(segment.path, f"{name} do not add up to {total}")
    if bool(((found["batches.rows"] == 0) != (found["batches.examples"] == 0)).any()):
        raise broken(segment.path, "it has a batch of rows without examples, or the other way round")
    for name, least in (("examples.input_ids", 0), ("examples.labels", IGNORED)):
        ids = found[name]
        if bool(((ids >= vocab_size) | (ids < 0) & (ids != least)).any()):
            raise broken(segment.path, f"{name} are not from 0 to {vocab_size - 1}")
    for name, tensor in found.items():
        if not all_finite(tensor):
            raise broken(segment.path, f"the tensor {name} has values that are not finite")
    for name in sizes.tensors():
        if name.startswith(("keys", "values")) and not all(map(all_finite, segment.rows_of(name).blocks())):
            raise broken(segment.path, f"the tensor {name} has values that are not finite")


def _check_batch(segment: Segment, batch: BatchFacts, examples: int) -> None:
    ids, positions = batch.rows[:2]
    lengths = {example: both.shape[1] for example, both in batch.examples.items()}
    if len(lengths) != examples or set(ids.tolist()) != set(lengths):
        raise broken(segment.path, f"the rows of batch {batch.number} are not of its examples")
    last = torch.tensor([lengths[example] for example in ids.tolist()]) - 1
    if bool(((positions < 0) | (positions >= last)).any()):
        raise broken(segment.path, f"the rows of batch {batch.number} have positions that their examples have not")


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.to(dtype) for tensor in tensors]) if len(tensors) else torch.empty(0, dtype=dtype)
