"""Calibration at the end of a build: which text it reads, and what it records of that."""

import logging
import subprocess
import sys

import datasets
import pytest
import torch

from knnmoe_hf import RoutingMemory, calibrate, detach_memory
from knnmoe_hf.calibration.background import KINDS, BackgroundText
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.models import logits_probe
from knnmoe_hf.models.probe import probe_model
from tests.conftest import tiny_model
from tests.memory.helpers import assert_same
from tests.support.domain import domain, own_text
from tests.support.tokenizers import MARKED, byte_tokenizer
from tests.support.training import trainer_for


def test_a_build_whose_calibration_fails_still_has_its_memory(bytewise, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("knnmoe_hf.training.refine.calibrate_prepared", fails)
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(8, 0)]
    trainer = trainer_for(bytewise, tmp_path, references, dict(num_neighbors=4), dict(ordinary_dataset=references))
    with pytest.raises(RuntimeError, match="no such luck"):
        trainer.train()
    assert len(trainer.memory) == 8 * 23 and trainer.memory.config.confidence == "calibrated"


FORMS = {
    "text": [{"text": "the gate routes a token"}],
    "input_ids": [{"input_ids": list(range(40, 60)), "labels": list(range(40, 60))}],
    "completion": [{"prompt": "the gate ", "completion": "routes a token"}],
    "messages": [
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the gate routes"}]}
    ],
}


def build(model, tmp_path, ordinary_dataset, tokenizer=None):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(16, 0, length=10)]
    options = dict(processing_class=tokenizer, ordinary_dataset=ordinary_dataset)
    config = dict(num_neighbors=4, gamma=0.1)
    more = dict(per_device_train_batch_size=16, builder_steps=4, max_length=30)
    trainer = trainer_for(model, tmp_path, references, config, options, **more)
    trainer.train()
    detach_memory(model)
    return trainer


@pytest.mark.parametrize("kind", ["list", "dataset", "by kind"])
def test_background_text_may_have_any_form(bytewise, tmp_path, kind):
    tokenizer, own = byte_tokenizer(MARKED), own_text(bytewise, 6, 3)
    rows = [{name: one[name] for name in ("input_ids", "labels")} for one in own] + sum(FORMS.values(), [])
    columns = {name: [one.get(name) for one in rows] for name in {name for one in rows for name in one}}
    given = {"list": rows, "dataset": datasets.Dataset.from_dict(columns), "by kind": {"a": rows, "b": rows[:7]}}[kind]
    trainer = build(bytewise, tmp_path, given, tokenizer)
    prepared = prepare_dataset(rows, tokenizer, 30)
    kinds = {"a": prepared, "b": prepared[:7]} if kind == "by kind" else {"given": prepared}
    fitted, wanted = calibrate(bytewise, trainer.memory, kinds, 16)
    assert trainer.calibration == wanted and set(wanted.harm) == set(kinds)
    assert_same(trainer.memory, fitted)
    for left_out in range(6, 9):  # a row of each form is used
        fewer = [one for index, one in enumerate(prepared) if index != left_out]
        assert calibrate(bytewise, trainer.memory, kinds | {next(iter(kinds)): fewer}, 16)[1] != wanted


def test_other_confidences_need_no_background_text(tmp_path, caplog):
    model = tiny_model("olmoe")
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        trainer = trainer_for(model, tmp_path, config=dict(confidence="rbf"))
        trainer.train()
    assert trainer.calibration is None and "calibrat" not in caplog.text


def test_a_build_without_tokenizer_and_background_text_falls_back(bytewise, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        trainer = build(bytewise, tmp_path, None)
    assert trainer.calibration is None and trainer.memory.layers[0].stats is None
    assert trainer.memory.config.confidence == "calibrated"
    _, cost, way_out = trainer.memory.verdict.sentences()  # which say it, so that no warning does
    assert "no background text" in cost and "ordinary_dataset" in way_out and "fell back to 'context'" in way_out
    assert not caplog.text


def test_a_build_with_a_tokenizer_uses_text_of_this_machine(bytewise, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "knnmoe_hf.calibration"):
        build(bytewise, tmp_path, None, byte_tokenizer())
    assert all(kind in caplog.text for kind in KINDS)  # each is named, as harmed or as improved


def test_what_a_calibration_reads_is_recorded_in_the_memory_and_logged(olmoe, tmp_path, caplog):
    texts = {kind: BackgroundText(rows, "this machine", [f"{kind}.txt"]) for kind, rows in olmoe.background.items()}
    with caplog.at_level(logging.INFO, "knnmoe_hf.calibration"):
        fitted, found = calibrate(olmoe.model, olmoe.memory, texts)
    for kind, record in found.background.items():
        assert record["source"] == "this machine" and record["files"] == [f"{kind}.txt"]
        assert record["examples"] == 24 and record["tokens"] == 24 * 24
        assert f"background text '{kind}' (this machine)" in caplog.text and record["sha256"][:16] in caplog.text
    fitted.save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).calibration == fitted.calibration == found


def test_a_calibration_on_given_text_records_that_text(olmoe):
    read = olmoe.found.background
    assert set(read) == set(olmoe.given) and olmoe.fitted.calibration == olmoe.found
    assert {record["source"] for record in read.values()} == {"given"} and not any(r["files"] for r in read.values())
    assert [record["examples"] for record in read.values()] == [len(rows) for rows in olmoe.given.values()]


def test_calibrating_needs_no_lab_and_prepares_once(olmoe, monkeypatch):
    probes, resets = [], []
    monkeypatch.setattr(logits_probe, "probe_model", lambda model: probes.append(1) or probe_model(model))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    calibrate(olmoe.model, olmoe.memory, olmoe.background)
    assert len(probes) == 1 and len(resets) == 2  # when the first hook is registered and when the last one is removed
    code = "import sys, knnmoe_hf.calibration.calibrate, knnmoe_hf.training.trainer;"
    code += "assert not any(name.startswith('knnmoe_hf.lab') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
