"""docs/format.md names every field of the records in a manifest."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.manifest import CalibrationRecord, Manifest
from knnmoe_hf.memory.measurements import ConfidenceBin, EvaluatedText, LayerConfidence, Measurements
from knnmoe_hf.memory.sweep import SweepPoint
from knnmoe_hf.memory.task_record import SubtaskRecord, TaskRecord
from knnmoe_hf.memory.verdict import NllChange, Verdict

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
ROWS = {
    "`verdict`": Verdict,
    "a change": NllChange,
    "`calibration.fits`, by recall": RecallFit,
    "`calibration.sweep`, a list": SweepPoint,
    "`task_record`": TaskRecord,
    "`task_record.subtasks`, by name": SubtaskRecord,
    "`card_data`": CardData,
    "`card_data.measured`": Measurements,
    "an entry of its `layers`": LayerConfidence,
    "an entry of its `references` and `background`": ConfidenceBin,
    "an entry of its `evaluations`": EvaluatedText,
}


@pytest.mark.parametrize("name", ROWS)
def test_every_field_of_a_record_is_documented(name):
    row = next(line for line in records().splitlines() if line.startswith(f"| {name} |"))
    assert {field.name for field in fields(ROWS[name])} <= set(re.findall(r"`(\w+)`", row.partition("|")[2]))


def test_every_entry_of_the_manifest_is_documented():
    entries = set(re.findall(r"^\| (`.*?`) \|", PAGE, flags=re.MULTILINE))
    named = {name for entry in entries for name in re.findall(r"`(\w+)`", entry)}
    assert {field.name for field in fields(Manifest)} <= named
    calibration = next(line for line in PAGE.splitlines() if line.startswith("| `calibration` |"))
    assert {field.name for field in fields(CalibrationRecord)} <= set(re.findall(r"`(\w+)`", calibration))


def records() -> str:
    return PAGE.partition("### Records")[2].partition("\n## ")[0]
