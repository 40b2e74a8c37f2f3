"""The tasks of SuperGPQA on invented items in the data set's schema: prompts, answers of responses, scores."""

import functools
import json
import sys

import datasets
import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.tasks.loading import HARNESS_TASKS
from knnmoe_hf.tasks.splits import is_reference

FOLDER = HARNESS_TASKS / "supergpqa"
OPTIONS = ["a red kite", "x + 1 (mod 3)", "Tomo's law", "3.5 m", "none of them"]
DISCIPLINES = ["Law", "Medicine", "Law", "Military Science", "Law", "Agronomy", "Economics", "Education"]
DISCIPLINES += ["Engineering", "History", "Literature and Arts", "Management", "Philosophy", "Science", "Sociology"]
PROMPT = (
    "Say it.\n\nQuestion:\nWhat is $x_{{1}}$?\nA) 1\nB) 2\n\nAnswer: Let's think.\nAnswer: A.\n\n"
    "Question:\n{}\n\nAnswer: "
)
"""In the form of the authors' prompt, with one invented example in place of their five."""


def items() -> list[dict]:
    """One question of each discipline, and two more of law."""
    return [
        {
            "uuid": f"{i:032x}",
            "question": f"Which of these did Mira find on day {i}?",
            "options": OPTIONS[: 4 + i % 2],
            "answer": OPTIONS[i % 4],
            "answer_letter": "ABCD"[i % 4],
            "discipline": discipline,
            "field": "Finding",
            "subfield": "Finding things",
            "difficulty": ("easy", "middle", "hard")[i % 3],
            "is_calculation": False,
        }
        for i, discipline in enumerate(DISCIPLINES)
    ]


@pytest.fixture(scope="module")
def utils():
    """The module beside the YAML files, as the harness loads it."""
    load_yaml(FOLDER / "supergpqa_law.yaml", resolve_func=True)
    return sys.modules[str(FOLDER / "utils")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The path of the items."""
    folder = tmp_path_factory.mktemp("supergpqa")
    path = folder / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, items())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield str(path)


@pytest.fixture
def load(rows):
    """`load(name)`: the tasks of a name, with the items in place of the data set on the Hub."""
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False)
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": rows}}}

    def load(name: str) -> dict:
        names = manager.task_index[name].cfg["task"] if name in manager.all_groups else [name]
        return manager.load([{"group": "local", "task": [{"task": name, **local} for name in names]}])["tasks"]

    return load


@pytest.fixture
def prompt_file(tmp_path, monkeypatch, utils):
    """The file of the prompt with examples."""
    (tmp_path / "five-shot.yaml").write_text(json.dumps({"prompt_format": [PROMPT]}))
    monkeypatch.setenv("SUPERGPQA_FIVE_SHOT", str(tmp_path / "five-shot.yaml"))
    utils._five_shot_prompt.cache_clear()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("I think so.\nAnswer: C", "C"),
        ("ANSWER : (D).", "D"),
        ("Answer: $\\boxed{B}$", "B"),
        ("**Answer:** E", "E"),
        ("**Answer: E**", "E"),
        ("The correct answer is: [A].", "A"),
        ("the best option is $\\mathbf{D}$.", "D"),
        ("(B)", "B"),
        ("$\\text{C}$.", "C"),
        ("Answer: A\nor rather\nAnswer: B", "B"),  # the last line first
        ("The answer is C.\nThat is all I know", "C"),  # then the whole response
        ("Answer: D\nThe answer is B.\nso it is", "B"),  # in the order of the patterns
        ("Answer: K", None),
        ("Answer: Dog", None),
        ("who knows", None),
        ("I do not know", "I"),  # as in the authors' code, which reads an option there
        ("", None),
        ("the answer is a proof", "a"),  # as in the authors' code a lower-case letter is an answer, and wrong
        ("Answer x + 1 (mod 3)", "B"),  # then the text of an option
        ("The right answer is Tomo's law.", "C"),
        ("3.5 m", "D"),
        ("3x5 m", None),  # signs of an option stand for themselves
        ("It is in the air: a red kite", None),
    ],
)
def test_the_answer_is_read_off_a_response(utils, response, answer):
    assert utils.answer_of(response, OPTIONS) == answer


def test_a_response_after_examples_is_cut_off_where_the_model_asks_itself(utils):
    of = functools.partial(utils.answer_of, options=OPTIONS, before="Question:")
    assert of("so it flies.\nAnswer: A.\n\nQuestion:\nAnd who?\nAnswer: B") == "A"
    assert of("so it flies.\n\nQuestion:\nAnd who?\nAnswer: B") == "B"  # the whole response, if there is none before
    assert utils.answer_of("Answer: A.\n\nQuestion:\nAnd who?\nAnswer: B", OPTIONS) == "B"


def test_a_score_is_right_wrong_or_without_an_answer(utils):
    item = items()[2]
    assert utils.process_results(item, ["Answer: C"]) == {"acc": 1, "no_answer": 0}
    assert utils.process_results(item, ["Answer: B"]) == {"acc": 0, "no_answer": 0}
    assert utils.process_results(item, ["who knows"]) == {"acc": 0, "no_answer": 1}
    assert utils.process_five_shot_results(item, ["Answer: C\nQuestion:\nAnswer: B"]) == {"acc": 1, "no_answer": 0}


@pytest.mark.parametrize("signs", ["$", "\\", "([{", "*\\boxed{", " "])
def test_a_long_run_of_signs_is_read_at_once(utils, signs):
    assert utils.answer_of("The answer is " + signs * 500, OPTIONS) is None


def test_the_prompt_is_instruction_question_and_options(load, utils):
    (task,) = load("supergpqa_military_science").values()
    (document,) = task.test_docs()
    assert document["uuid"] == f"{3:032x}"
    assert task.fewshot_context(document, num_fewshot=0) == utils.INSTRUCTION + (
        "\n\nWhich of these did Mira find on day 3?\nA) a red kite\nB) x + 1 (mod 3)\nC) Tomo's law\nD) 3.5 m\n"
        "E) none of them\n"
    )
    assert task.doc_to_target(document) == "Answer: D"
    settings = task.config.generation_kwargs
    assert (settings["max_gen_toks"], settings["do_sample"], settings["temperature"]) == (4096, False, 0.0)


def test_the_prompt_with_examples_is_that_of_the_authors_file(load, utils, prompt_file):
    (task,) = load("supergpqa_five_shot_military_science").values()
    prompt = task.fewshot_context(next(iter(task.test_docs())), num_fewshot=0)
    assert prompt == PROMPT.format(utils.block(items()[3])) and "$x_{1}$" in prompt


def test_without_the_authors_file_one_sentence_says_what_to_do(utils, prompt_file, monkeypatch):
    monkeypatch.setenv("SUPERGPQA_FIVE_SHOT", "/no/such/file")
    with pytest.raises(ValueError, match="download https://.+five-shot.yaml and name the file in the environment"):
        utils.five_shot(items()[0])


@pytest.mark.parametrize("name", ["supergpqa", "supergpqa_five_shot"])
def test_the_disciplines_share_out_the_questions(load, prompt_file, name):
    counts = {task: len(list(one.test_docs())) for task, one in load(name).items()}
    names = {f"{name}_{discipline.lower().replace(' ', '_')}" for discipline in DISCIPLINES}
    assert counts == dict.fromkeys(names, 1) | {f"{name}_law": 3}


def test_the_half_that_is_held_out_has_no_reference(load):
    (task,) = load("supergpqa_held_out").values()
    tested = [document["question"] for document in task.test_docs()]
    references = [document["question"] for document in task.config.process_docs.references(task.dataset["train"])]
    assert sorted(tested + references) == sorted(item["question"] for item in items()) and tested and references
    assert all(map(is_reference, references)) and not any(map(is_reference, tested))


def test_a_task_of_a_users_own_file_includes_one_of_ours(rows, tmp_path):
    """As docs/evaluation.md says."""
    lines = [f"include: {FOLDER / 'supergpqa_held_out.yaml'}", "task: my_questions", "dataset_path: json"]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {{data_files: {{train: {rows}}}}}"]))
    (task,) = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["my_questions"])["tasks"].values()
    assert 0 < len(list(task.test_docs())) < len(items())


@pytest.fixture(scope="module")
def lab() -> HFLM:
    return HFLM(str(LAB_MODELS["olmoe"]), device="cpu", dtype="float32", batch_size=2, max_length=512)


@pytest.mark.parametrize("name", ["supergpqa_law", "supergpqa_five_shot_law"])
def test_a_lab_model_is_scored_from_end_to_end(load, lab, prompt_file, utils, name):
    tasks = load(name)
    tasks[name].set_config(key="generation_kwargs", value={"max_gen_toks": 8}, update=True)
    found = evaluate(lm=lab, task_dict={"tasks": tasks}, bootstrap_iters=0)
    samples = found["samples"][name]
    for sample in samples:
        answer = utils.answer_of(sample["filtered_resps"][0], sample["doc"]["options"])
        assert (sample["acc"], sample["no_answer"]) == (answer == sample["doc"]["answer_letter"], answer is None)
    for metric in ("acc", "no_answer"):
        assert found["results"][name][f"{metric},none"] == pytest.approx(sum(one[metric] for one in samples) / 3)
