"""`knnmoe build --task`: a memory from a benchmark, and what is said where that is not possible."""

import json

import pytest

pytest.importorskip("lm_eval")

from transformers import AutoConfig

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.tasks import load_task, references_of
from tests.cli.helpers import one_error
from tests.support.tokenizers import byte_tokenizer

QUICK = ["--builder-steps", "1", "--batch-size", "4", "--num-neighbors", "4", "--confidence", "context"]


def build(base, output, *words):
    return main(["build", "--model", str(base), "--output", str(output), "--quiet", *QUICK, *words])


def test_a_memory_of_mmlu_questions(base, tmp_path, capsys):
    words = [
        "--task",
        "mmlu_dev_plumbing",
        "--task-limit",
        "3",
        "--num-fewshot",
        "1",
        "--system-instruction",
        "Think.",
    ]
    assert build(base, tmp_path / "memory", *words) == 0
    assert "mmlu_dev_plumbing: 0 of 3 references equal a test item and 0 nearly do" in capsys.readouterr().out
    memory = RoutingMemory.from_pretrained(tmp_path / "memory")
    benchmark = load_task("mmlu_dev_plumbing", num_fewshot=1, system_instruction="Think.")
    expected = references_of(benchmark, byte_tokenizer(), limit=3)
    longest = AutoConfig.from_pretrained(base).max_position_embeddings  # as in an evaluation, cut at the beginning
    kept = [item.tokens[-longest:] for item in expected]
    assert [tuple(ids.tolist()) for ids in memory.provenance.tokens().values()] == kept
    assert len(memory) == sum(len(ids) - 1 for ids in kept)  # every token but the first is a target
    record = memory.task_record
    assert (record.task, record.references, record.system_instruction) == ("mmlu_dev_plumbing", 3, "Think.")
    assert record.differences(benchmark.tasks["mmlu_dev_plumbing"], system_instruction="Think.") == []
    assert main(["info", str(tmp_path / "memory")]) == 0
    assert "It was built from the benchmark mmlu_dev_plumbing (lm-evaluation-harness" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "memory"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"]["subtasks"]["mmlu_dev_plumbing"]["num_fewshot"] == 1


def test_a_text_is_no_benchmark(built):
    assert RoutingMemory.from_pretrained(built).task_record is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the references with --dataset or --task"),
        (["--task", "mmlu", "--dataset", "lab:topics/reference"], "--task and --dataset exclude each other"),
        (
            ["--dataset", "lab:topics/reference", "--num-fewshot", "5"],
            "--num-fewshot is for a benchmark: name it with",
        ),
        (["--task", "mmlu", "--max-length", "64"], "--max-length is not allowed with --task"),
        (["--task", "mmlu", "--task-limit", "0"], "'0' is not allowed: use an integer of at least 1"),
    ],
)
def test_what_does_not_go_together(base, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        build(base, tmp_path / "memory", *words)
    assert said in one_error(capsys.readouterr(), "build")


def test_missing_data_is_one_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build(base, tmp_path / "memory", "--task", "medmcqa") == 1
    assert "needs the data set openlifescienceai/medmcqa, which is not on this machine" in one_error(
        capsys.readouterr(), "build"
    )
    assert not (tmp_path / "memory").exists()


def test_a_split_of_the_benchmark(base, tmp_path, capsys):
    assert build(base, tmp_path / "memory", "--task", "lab_topics", "--split", "test") == 1
    said = one_error(capsys.readouterr(), "build")
    assert said.startswith("split 'test' of task lab_topics is not possible: use one of reference")
