"""Measures a memory for its verdict: the gain on held-out references, the cost on text that no calibration read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.held_out import hold_out_for_verdict
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.references import References
from knnmoe_hf.evaluation.scores import Scores, paired_bootstrap, score_kinds
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.verdict import HELD_OUT_SHARE, MEASURED_WITH, MOST_WINDOWS, NllChange, Verdict
from knnmoe_hf.models.attach import AttachedMemory
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import hooked, using_overrides


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
    """
    The change of the NLL on held-out references, the same with `confidence="rbf"`, and how many held-out references
    were not counted because other references have their text.
    """
    held, memory = hold_out_for_verdict(references), prepared.memory
    rows = _distinct(held.rows) if held is not None else []
    repeated = min(MOST_WINDOWS, len(references.tokens()) // HELD_OUT_SHARE) - len(rows)
    if not rows:
        return None, None, repeated
    rest = memory.take(torch.isin(memory.provenance.example_ids, references.example_ids[held.rest].unique()))
    used = wide_open = _NOTHING
    if len(rest):  # otherwise no row of theirs was selected, so that the model routes as without a memory
        used = prepared.with_rows_of(rest)
        wide_open = used.with_options(replace(used.options, confidence="rbf"))
    base, used, opened = (run.scores({"": rows}, overrides)[""] for overrides in (_NOTHING, used, wide_open))
    return _change(base, used), _change(base, opened), repeated


def _costs(run: _Run, prepared: AttachedMemory, texts: Mapping[str, BackgroundText]) -> dict[str, NllChange]:
    unread = {kind: text.unread for kind, text in texts.items()}
    base, used = run.scores(unread, _NOTHING), run.scores(unread, prepared)
    changes = {kind: _change(base[kind], used[kind], texts[kind].source) for kind in unread}
    return {kind: change for kind, change in changes.items() if change is not None}


def _change(base: Scores, changed: Scores, source: str | None = None) -> NllChange | None:
    if not base.tokens.sum():
        return None
    change = paired_bootstrap(base, changed)
    return NllChange(change.mean, change.low, change.high, change.windows, source)


def _distinct(rows: list[dict]) -> list[dict]:
    """Leaves out rows that repeat the text of an earlier row: a window that comes twice tells no more than one."""
    kept: list[dict] = []
    for row in rows:
        if not kept or not bool(References.of_rows(kept).overlapping([row])):
            kept.append(row)
    return kept
