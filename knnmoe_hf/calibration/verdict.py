"""Measures the verdict on a memory: its gain on references held out, and its cost on background text, both unread."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.held_out import HeldOut, hold_out_for_verdict, without_copies
from knnmoe_hf.data.ngrams import NGRAM, example_hashes, ngram_hashes
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.scores import Scores, paired_bootstrap, score_kinds
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.verdict import LEAST_WINDOWS, MEASURED_WITH, NllChange, Verdict
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import hooked, using_overrides

_REPEATED = 0.5
"""Share of an example's runs of tokens that others hold, from which on its text counts as theirs."""


def measure_verdict(
    model: nn.Module,
    prepared: AttachedMemory,
    background: Mapping[str, BackgroundText],
    batch_size: int = 8,
    processes: Processes = ALONE,
    references: Provenance | None = None,
    fallback: str | None = None,
) -> Verdict:
    """
    Scores text that neither the memory nor its calibration has read, with the memory and without it.

    Args:
        model: the memory's base model, which is only read.
        prepared: the memory as it is going to be used, with the text of its references.
        background: text by kind, of which `unread` is scored.
        batch_size: examples per forward pass.
        processes: share the batches; all of them call this alike and get the same.
        references: of all rows of the build, if the memory has only some of them; what was selected by its gain is no
            sample to measure a gain on.
        fallback: why `confidence="calibrated"` fell back to `"context"`, if it did.
    """
    memory = prepared.memory
    references = references if references is not None else memory.provenance
    run = _Run(model, batch_size, processes)
    with hooked(model):
        gain, open_gain, repeated = _gains(run, prepared, references)
        elsewhere = _costs(run, prepared, {kind: text for kind, text in background.items() if len(text.unread)})
    return Verdict(
        examples=len(references.tokens()),
        tokens=len(references.example_ids),
        repeated=repeated,
        gain=gain,
        open_gain=open_gain,
        elsewhere=elsewhere,
        confidence=prepared.options.confidence,
        fallback=fallback,
        settings={name: getattr(memory.config, name) for name in MEASURED_WITH},
    )


class _Run(NamedTuple):
    """How the model is run on text."""

    model: nn.Module
    batch_size: int
    processes: Processes

    def scores(self, rows: Mapping[str, Sequence[dict]], overrides: Overrides) -> dict[str, Scores]:
        with using_overrides(self.model, overrides):
            return score_kinds(self.model, rows, self.batch_size, self.processes)


_NOTHING = Overrides({})


def _gains(
    run: _Run, prepared: AttachedMemory, references: Provenance
) -> tuple[NllChange | None, NllChange | None, int]:
    """The change on held-out references, the same wide open, and how many references are repeated in others."""
    whole = hold_out_for_verdict(references)
    held = without_copies(whole, references) if whole is not None else None
    if held is None:
        return None, None, len(whole.rows) if whole is not None else 0
    rows = _not_repeated(held, references)
    repeated = len(whole.rows) - len(rows)
    memory = prepared.memory
    rest = memory.take(torch.isin(memory.provenance.example_ids, references.example_ids[held.rest].unique()))
    if not rows or not len(rest):
        return None, None, repeated
    rest = prepared.with_rows_of(rest)
    wide_open = rest.with_options(replace(rest.options, confidence="rbf"))
    base, used, opened = (run.scores({"": rows}, overrides)[""] for overrides in (_NOTHING, rest, wide_open))
    return _change(base, used), _change(base, opened), repeated


def _costs(run: _Run, prepared: AttachedMemory, texts: Mapping[str, BackgroundText]) -> dict[str, NllChange]:
    unread = {kind: text.unread for kind, text in texts.items()}
    base, used = run.scores(unread, _NOTHING), run.scores(unread, prepared)
    changes = {kind: _change(base[kind], used[kind], texts[kind].source) for kind in unread}
    return {kind: change for kind, change in changes.items() if change is not None}


def _change(base: Scores, changed: Scores, source: str | None = None) -> NllChange | None:
    windows = int((base.tokens > 0).sum())
    if not windows:
        return None
    change = paired_bootstrap(base, changed)
    bounds = (change.low, change.high) if windows >= LEAST_WINDOWS else (None, None)
    return NllChange(change.mean, *bounds, windows, source)


def _not_repeated(held: HeldOut, references: Provenance) -> list[dict]:
    """The held-out examples without those whose text the rest holds, or another one of them that comes before."""
    rest = references.select(held.rest)
    texts = [torch.tensor(row["input_ids"]) for row in held.rows]
    runs = [ngram_hashes(ids) for ids in texts]
    known, _ = example_hashes(rest.token_ids, rest.offsets)
    held_by_rest = torch.isin(torch.cat(runs), known).split([len(one) for one in runs])
    # texts that are shorter than a run are compared as a whole
    seen = {tuple(ids.tolist()) for ids in rest.tokens().values() if len(ids) < NGRAM}
    kept = []
    for row, ids, own, among_rest in zip(held.rows, texts, runs, held_by_rest):
        own = own.tolist() or [tuple(ids.tolist())]
        among = among_rest.tolist() or [False]
        if sum(run in seen or found for run, found in zip(own, among)) < _REPEATED * len(own):
            kept.append(row)
            seen.update(own)
    return kept
