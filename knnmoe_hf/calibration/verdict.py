"""
Measures a memory for its verdict: the gain on held-out references, the cost on text that no calibration read.

The same passes tell how confident the memory is, by layer and by token, which its card shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.confidences import Watched, bins_of, layers_of, score_watched
from knnmoe_hf.calibration.held_out import hold_out_for_verdict
from knnmoe_hf.distributed import ALONE, Processes
from knnmoe_hf.evaluation.references import References
from knnmoe_hf.evaluation.scores import Scores, paired_bootstrap, score_kinds
from knnmoe_hf.memory.measurements import Measurements
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
) -> tuple[Verdict, Measurements]:
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
        gains = _gains(run, prepared, references)
        costs = _costs(run, prepared, {kind: text for kind, text in background.items() if len(text.unread)})
    verdict = Verdict(
        examples=len(references.tokens()),
        tokens=len(references.example_ids),
        repeated=gains.repeated,
        gain=gains.gain,
        open_gain=gains.open_gain,
        elsewhere=costs.changes,
        confidence=prepared.options.confidence,
        fallback=fallback,
        settings={name: getattr(memory.config, name) for name in MEASURED_WITH},
    )
    measured = Measurements(
        base_nll=gains.base.scores.mean_nll if gains.gain is not None else None,
        elsewhere_nll={kind: costs.base[kind].scores.mean_nll for kind in costs.changes},
        layers=layers_of(list(prepared), gains.used, costs.used.values()),
        references=bins_of([gains.base], [gains.used]),
        background=bins_of(costs.base.values(), costs.used.values()),
    )
    return verdict, measured


class _Run(NamedTuple):
    """How the model is run on text."""

    model: nn.Module
    batch_size: int
    processes: Processes

    def scores(self, rows: Mapping[str, Sequence[dict]], overrides: Overrides) -> dict[str, Scores]:
        with using_overrides(self.model, overrides):
            return score_kinds(self.model, rows, self.batch_size, self.processes)

    def watched(self, rows: Mapping[str, Sequence[dict]], overrides: Overrides) -> dict[str, Watched]:
        return score_watched(self.model, rows, overrides, self.batch_size, self.processes)


_NOTHING = Overrides({})


class _Gains(NamedTuple):
    """
    The change of the NLL on held-out references, the same with `confidence="rbf"`, how many held-out references were
    not counted because other references have their text, and the scores without the memory and with it.
    """

    gain: NllChange | None
    open_gain: NllChange | None
    repeated: int
    base: Watched = Watched.nothing()
    used: Watched = Watched.nothing()


class _Costs(NamedTuple):
    """The change of the NLL by kind of background text, and the scores without the memory and with it."""

    changes: dict[str, NllChange]
    base: dict[str, Watched]
    used: dict[str, Watched]


def _gains(run: _Run, prepared: AttachedMemory, references: Provenance) -> _Gains:
    held, memory = hold_out_for_verdict(references), prepared.memory
    rows = _distinct(held.rows) if held is not None else []
    repeated = min(MOST_WINDOWS, len(references.tokens()) // HELD_OUT_SHARE) - len(rows)
    if not rows:
        return _Gains(None, None, repeated)
    rest = memory.take(torch.isin(memory.provenance.example_ids, references.example_ids[held.rest].unique()))
    used = wide_open = _NOTHING
    if len(rest):  # otherwise no row of theirs was selected, so that the model routes as without a memory
        used = prepared.with_rows_of(rest)
        wide_open = used.with_options(replace(used.options, confidence="rbf"))
    base, used = (run.watched({"": rows}, overrides)[""] for overrides in (_NOTHING, used))
    opened = run.scores({"": rows}, wide_open)[""]
    return _Gains(_change(base.scores, used.scores), _change(base.scores, opened), repeated, base, used)


def _costs(run: _Run, prepared: AttachedMemory, texts: Mapping[str, BackgroundText]) -> _Costs:
    unread = {kind: text.unread for kind, text in texts.items()}
    base, used = run.watched(unread, _NOTHING), run.watched(unread, prepared)
    changes = {kind: _change(base[kind].scores, used[kind].scores, texts[kind].source) for kind in unread}
    return _Costs({kind: change for kind, change in changes.items() if change is not None}, base, used)


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
