"""The record of a benchmark stays with a memory: saved, opened, edited; older memories have none."""

from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.task_record import SubtaskRecord, TaskRecord
from tests.memory.helpers import edit_config, full_memory, refused
from tests.support.models import tiny_model

RECORD = TaskRecord(
    task="mmlu",
    harness="0.4.13",
    subtasks={"mmlu_anatomy": SubtaskRecord("cais/mmlu:anatomy", ["dev", "validation"], 5, "0" * 64, 4)},
    apply_chat_template=False,
    system_instruction=None,
    fewshot_as_multiturn=True,
    references=4,
    equal=2,
    near=1,
    digest="1" * 64,
)


@pytest.fixture
def memory():
    return replace(full_memory(tiny_model("olmoe")), task_record=RECORD)


def test_a_record_is_saved_and_opened(memory, tmp_path):
    memory.save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).task_record == RECORD
    card = (tmp_path / "README.md").read_text()
    assert "built from the benchmark mmlu (lm-evaluation-harness 0.4.13): 4 references of dev and validation" in card
    assert "5 worked examples in each prompt; 2 that equal a test item and 1 that nearly do were left out" in card


def test_a_memory_of_before_there_were_records_opens(memory, tmp_path):
    replace(memory, task_record=None).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["memory"].pop("task_record"))
    assert RoutingMemory.from_pretrained(tmp_path).task_record is None
    assert "benchmark" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("references", -1), ("task", 3), ("apply_chat_template", None), ("subtasks", {"a": {}})]
)
def test_a_record_of_another_form_is_refused(memory, tmp_path, name, value):
    memory.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["memory"]["task_record"].update({name: value}))
    refused(tmp_path)


def test_edits_keep_the_record(memory):
    first = int(memory.provenance.example_ids[0])
    assert memory.remove_examples([first]).task_record == RECORD
    assert memory.select_rows(max_rows=5).task_record == RECORD
    assert memory.take(torch.arange(len(memory)) < 6).task_record == RECORD


def test_a_merged_memory_has_the_record_of_both_or_none(memory):
    other = replace(memory, provenance=memory.provenance)
    assert memory.merge(other).task_record == RECORD
    assert memory.merge(replace(other, task_record=None)).task_record is None
    assert replace(memory, task_record=None).merge(other).task_record is None
