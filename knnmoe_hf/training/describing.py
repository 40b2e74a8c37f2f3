"""What a build knows for its memory's card: the data, its own options, and how the memory does on `eval_dataset`."""

import itertools
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.overlap import without_overlap
from knnmoe_hf.evaluation.scores import paired_bootstrap, score
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.memory.card_data import CardData, why_no_repository
from knnmoe_hf.memory.measurements import EvaluatedText, printable
from knnmoe_hf.memory.verdict import MOST_WINDOWS, NllChange
from knnmoe_hf.models.attach import disable_memory
from knnmoe_hf.training.options import BuildOptions

logger = logging.getLogger(__name__)

_BUILD = (
    "builder",
    "builder_steps",
    "num_candidates",
    "candidate_steps",
    "learning_rate",
    "max_length",
    "max_rows",
    "min_gain",
    "num_layers",
)
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")


def card_data_of(args: BuildOptions, repositories: list[str], known: CardData) -> CardData:
    """
    What the card of a build says before anything is measured.

    Args:
        args: of the build.
        repositories: of the Hub that the references came from.
        known: what the memory knows of its base model.
    """
    given = {"dataset_tags": repositories} | args.card_statements()
    given = {"dataset": given["dataset_tags"]} | given
    options = {name: getattr(args, name) for name in _BUILD if getattr(args, name) is not None}
    if args.builder == "search":  # which has no gradient
        options.pop("learning_rate")
    return CardData(finetuned_from=known.finetuned_from, build=options).stated(**given)


def repositories_of(dataset: Any) -> list[str]:
    """The repositories of the Hub that a data set of `datasets` was downloaded from."""
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = dict.fromkeys(match[1] for name in checksums if (match := _ON_HUB.match(str(name))))
    return [name for name in found if why_no_repository(name) is None]


def evaluate_for_card(
    model: nn.Module,
    memory: RoutingMemory,
    eval_dataset: Any,
    batch_size: int,
    allow_overlap: bool,
    processes: Processes = ALONE,
) -> list[EvaluatedText]:
    """
    Scores each text of `eval_dataset` with the memory in force and without it, at most 256 windows of it, evenly
    spaced (of a stream, the first).

    Args:
        model: with the memory attached and in force.
        memory: whose references are looked up, so that no text is scored that it holds.
        eval_dataset: rows as `prepare_dataset` returns them, or a dict of such data sets by name; None for none.
        batch_size: examples per forward pass.
        allow_overlap: score text that the memory holds too.
        processes: share the batches; all of them call this alike and get the same.

    Returns:
        What was found, by text; one of which nothing is left to score is left out, which a warning says.
    """
    texts = eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation text": eval_dataset}
    found = []
    for name, dataset in texts.items():
        if dataset is None:
            continue
        rows, overlap = without_overlap(memory, _some(dataset), allow_overlap)
        scored = [score(model, rows, batch_size, processes=processes)]
        with disable_memory(model):
            scored.append(score(model, rows, batch_size, processes=processes))
        used, base = scored
        if not base.tokens.sum():
            logger.warning(
                "the card tells nothing of %s: none of its text that the memory does not hold is left", name
            )
            continue
        change = paired_bootstrap(base, used)
        change = NllChange(change.mean, change.low, change.high, change.windows)
        numbers = dict(tokens=int(base.tokens.sum()), base_nll=base.mean_nll, change=change)
        found.append(EvaluatedText(printable(name), **numbers, left_out=overlap.left_out, overlap=overlap.share))
    return found


def _some(dataset: Any) -> list[Mapping[str, Any]]:
    if not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, MOST_WINDOWS))
    count = min(len(dataset), MOST_WINDOWS)
    return [dataset[place] for place in torch.linspace(0, len(dataset) - 1, count).round().long().tolist()]
