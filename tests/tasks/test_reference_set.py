"""The references of each benchmark come from the right split, and hold no test item."""

import textwrap

import pytest

from knnmoe_hf.tasks import items_of, load_task, references_of
from knnmoe_hf.tasks.reference_set import reference_set
from knnmoe_hf.tasks.splits import is_reference
from tests.tasks import benchmarks


def splits(items):
    return {item.prompt.id.split("/")[1] for item in items}


def questions(items):
    return {item.prompt.text.split("\n")[0] for item in items}


def test_medqa_trains_on_train(here, tokenizer):
    benchmarks.medqa(here)
    found = reference_set(load_task("medqa_4options"), tokenizer)
    assert splits(found.items) == {"train"} and len(found.items) == 6
    text = tokenizer.decode(found.items[0].tokens)
    assert text.startswith("Question: ") and text.split()[-1] in "ABCD"


def test_medmcqa_is_tested_on_validation(here, tokenizer):
    benchmarks.medmcqa(here)
    benchmark = load_task("medmcqa")
    assert splits(reference_set(benchmark, tokenizer).items) == {"train"}
    assert splits(items_of(benchmark, tokenizer)) == {"validation"}


def test_diamond_has_the_questions_of_extended_that_it_has_not_itself(here, tokenizer):
    benchmarks.gpqa(here)
    benchmark = load_task("gpqa_diamond_zeroshot")
    found = reference_set(benchmark, tokenizer)
    assert len(found.items) == 12 and (found.report.equal, found.report.near) == (8, 0)
    assert not questions(found.items) & questions(items_of(benchmark, tokenizer))


@pytest.mark.parametrize("part", ["main", "extended"])
def test_gpqa_is_halved_into_references_and_test_items(part, here, tokenizer):
    benchmarks.gpqa(here)
    benchmark = load_task(f"gpqa_{part}_zeroshot_held_out")
    references, tests = reference_set(benchmark, tokenizer), items_of(benchmark, tokenizer)
    assert all(map(is_reference, questions(references.items))) and not any(map(is_reference, questions(tests)))
    assert references.report.pairs == () and not questions(references.items) & questions(tests)
    harness = {item.prompt.text: item for item in items_of(load_task(f"gpqa_{part}_zeroshot"), tokenizer)}
    assert {item.prompt.text for item in tests} <= set(harness)


def test_a_benchmark_that_is_tested_whole_names_its_half(here, tokenizer):
    benchmarks.gpqa(here)
    with pytest.raises(
        ValueError, match="all 20 equal a test item, or nearly, so use the task gpqa_extended_zeroshot"
    ):
        reference_set(load_task("gpqa_extended_zeroshot"), tokenizer)


def test_supergpqa_is_halved_into_references_and_test_items(here, tokenizer):
    benchmarks.supergpqa(here)
    benchmark = load_task("supergpqa_held_out")
    references, tests = reference_set(benchmark, tokenizer), items_of(benchmark, tokenizer)
    assert len(references.items) + len(tests) == 12 and references.report.pairs == ()


def test_mbpp_leaves_out_its_worked_examples(here, tokenizer, monkeypatch):
    benchmarks.mbpp(here)
    (here / "code_eval").mkdir()
    (here / "code_eval" / "code_eval.py").write_text(_CODE_EVAL)  # that of the Hub cannot be had
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    benchmark = load_task("mbpp")
    found = reference_set(benchmark, tokenizer)
    assert splits(found.items) == {"train", "prompt"} and len(found.items) == 7
    text = tokenizer.decode(found.items[0].tokens)
    assert text.count("[BEGIN]") == 4 and text.endswith("[DONE]") and "def add_" in text
    assert splits(items_of(benchmark, tokenizer)) == {"test"}


_CODE_EVAL = textwrap.dedent(
    """
    import datasets
    import evaluate

    class CodeEval(evaluate.Metric):
        def _info(self):
            features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("string")),
                                          "references": datasets.Value("string")})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions, references, k):
            return {"pass@1": 0.0}, {}
    """
)


def test_without_a_further_split_there_are_no_references(here, tokenizer):
    (here / "rows.jsonl").write_text('{"text": "a", "answer": "b"}\n')
    (here / "alone.yaml").write_text(
        "task: alone\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: answer\n"
    )
    from lm_eval.tasks import TaskManager

    from knnmoe_hf.tasks import Benchmark

    benchmark = Benchmark("alone", TaskManager(include_path=str(here), include_defaults=False).load(["alone"]))
    with pytest.raises(ValueError, match="task alone has no split beside the one that it is tested on: name data of"):
        references_of(benchmark, tokenizer)


def test_a_split_that_is_asked_for(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    benchmark = load_task("mmlu_anatomy")
    assert splits(references_of(benchmark, tokenizer, split="validation")) == {"validation"}
    for wrong in ("test", "auxiliary_train"):
        with pytest.raises(
            ValueError, match=f"split '{wrong}' of task mmlu_anatomy is not possible: use one of dev, "
        ):
            references_of(benchmark, tokenizer, split=wrong)


def test_copies_of_test_items_are_counted_and_left_out(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    path = here / "cais/mmlu/anatomy"
    copies = (path / "test.jsonl").read_text().splitlines(keepends=True)[:3]
    copies[1] = copies[1].replace("Of anatomy", "OF  ANATOMY")
    copies[2] = copies[2].replace("Of anatomy: ", "Of anatomy: and ")
    with (path / "validation.jsonl").open("a") as file:
        file.writelines(copies)
    found = reference_set(load_task("mmlu_anatomy"), tokenizer)
    assert (found.report.equal, found.report.near, len(found.items)) == (2, 1, 9)


def test_a_limit_keeps_the_first_references(here, tokenizer):
    benchmarks.medqa(here)
    benchmark = load_task("medqa_4options")
    whole = reference_set(benchmark, tokenizer).items
    assert reference_set(benchmark, tokenizer, limit=2).items == whole[:2]
    room = len(whole[0].tokens) + len(whole[1].tokens)
    assert reference_set(benchmark, tokenizer, max_tokens=room + 1).items == whole[:2]
    with pytest.raises(
        ValueError, match="medqa_4options gives no reference: the first one has more than max_tokens=5"
    ):
        reference_set(benchmark, tokenizer, max_tokens=5)


def test_the_beginning_of_a_long_reference_is_cut_off(here, tokenizer):
    benchmarks.medqa(here)
    benchmark = load_task("medqa_4options")
    whole, cut = (reference_set(benchmark, tokenizer, longest=longest).items for longest in (None, 20))
    assert [item.tokens for item in cut] == [item.tokens[-20:] for item in whole]


def test_the_record_says_what_was_built_from(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    benchmark = load_task("mmlu_anatomy", num_fewshot=1, system_instruction="Be brief.")
    record = reference_set(benchmark, tokenizer).record
    one = record.subtasks["mmlu_anatomy"]
    assert (one.dataset, one.splits, one.num_fewshot, one.references) == (
        "cais/mmlu:anatomy",
        ["dev", "validation"],
        1,
        9,
    )
    task = benchmark.tasks["mmlu_anatomy"]
    assert record.differences(task, system_instruction="Be brief.") == []
    other = load_task("mmlu_anatomy", num_fewshot=0).tasks["mmlu_anatomy"]
    assert record.differences(other) == ["num_fewshot is 0, not 1", "system_instruction is None, not 'Be brief.'"]
    other.set_config("doc_to_text", "{{question}}")
    assert record.differences(other)[0] == "the templates of the prompts differ"
    assert record.differences(load_task("lab_topics").tasks["lab_topics"]) == [
        "the task is lab_topics, not mmlu_anatomy"
    ]


@pytest.mark.slow
def test_all_subjects_of_mmlu_give_references_in_turn(here, tokenizer):
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    benchmarks.mmlu(here, list(SUBJECTS))
    benchmark = load_task("mmlu")
    assert len(benchmark.tasks) == 57
    found = reference_set(benchmark, tokenizer, limit=114)
    assert len({item.prompt.group for item in found.items[:57]}) == 57
    for item in found.items[:57]:
        subject = item.prompt.group.removeprefix("mmlu_").replace("_", " ")
        assert f"(with answers) about {subject}." in tokenizer.decode(item.prompt.tokens)
    assert len(found.record.subtasks) == 57
