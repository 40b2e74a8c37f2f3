"""Questions from text that every machine has: sound, the same each time, and not to be told by their form."""

import re
import statistics

import pytest

from knnmoe_hf.lab.corpus import documents
from knnmoe_hf.tasks import load_task, without_test_items
from knnmoe_hf.tasks.reference_set import reference_set


@pytest.fixture(scope="module", params=["topics", pytest.param("headers", marks=pytest.mark.slow)])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def rows(kind):
    (task,) = load_task(f"lab_{kind}").tasks.values()
    return {split: list(task.dataset[split]) for split in ("reference", "test")}


def test_there_are_enough_questions(rows):
    assert len(rows["test"]) >= 450 and len(rows["reference"]) >= 500


def test_the_right_choice_goes_on_with_the_text(kind, rows):
    text = "\0".join(documents(kind, "test"))
    for row in rows["test"][:60]:
        right = row["choices"][row["answer"]]
        assert row["context"] + right in text
        assert len(set(row["choices"])) == 4 and all(choice in text for choice in row["choices"])
        assert sum(row["context"] + choice in text for choice in row["choices"]) == 1


def test_choices_are_whole_words_and_single_tokens(kind, rows, tokenizer):
    text = "\0".join(documents(kind, "test"))
    for row in rows["test"][:60]:
        right = row["choices"][row["answer"]]
        after = text[text.index(row["context"] + right) + len(row["context"]) :]
        assert re.match(r" [^\W\d_]{2,}(?!\w)", after)[0] == right
        prompt = tokenizer(row["context"])["input_ids"]
        for choice in row["choices"]:
            assert tokenizer(row["context"] + choice)["input_ids"][:-1] == prompt


def test_the_form_does_not_tell_the_right_choice(rows):
    places = [row["answer"] for row in rows["test"]]
    assert all(0.15 < places.count(place) / len(places) < 0.35 for place in range(4))
    for row in rows["test"]:
        assert len({choice[0] if choice[0].isspace() else "" for choice in row["choices"]}) == 1
    assert all(accuracy_by_length(rows["test"], best) < 0.4 for best in (max, min))


def accuracy_by_length(rows: list[dict], best) -> float:
    """Of answering with the longest or the shortest choice, or any one of these."""
    lengths = [(len(row["choices"][row["answer"]]), list(map(len, row["choices"]))) for row in rows]
    return statistics.mean((right == best(all_)) / all_.count(best(all_)) for right, all_ in lengths)


def test_references_are_other_text_of_enough_tokens_for_a_memory(kind, rows, tokenizer):
    found = reference_set(load_task(f"lab_{kind}"), tokenizer, limit=250)
    assert len(found.items) == 250 and found.report.near <= 3
    assert statistics.mean(len(item.tokens) for item in found.items) >= 64
    assert not {row["context"] for row in rows["reference"]} & {row["context"] for row in rows["test"]}
    assert without_test_items(found.items, found.items)[1].equal >= 245  # the check sees all with enough words


@pytest.mark.slow
def test_python_is_what_the_lab_models_know():
    (task,) = load_task("lab_python").tasks.values()
    assert len(task.dataset["test"]) >= 300
