"""References that are test items too, whatever was changed to hide it, and those that only look alike."""

import pytest

from knnmoe_hf.tasks import Item, Prompt, without_test_items

QUESTION = (
    "A potter in the old quarter fires 24 bowls in a kiln that holds 6 of them at a time; how many times must she "
    "light the fire?"
)
CHOICES = ["two times", "three times", "four times", "six times"]
SHORT = "What is the capital of France?"
CITIES = ["Paris", "Madrid", "Rome", "Berlin"]


def item(name: str, question: str, choices: list[str] = CHOICES) -> Item:
    text = "\n".join([question, *(f"- {choice}" for choice in choices)])
    return Item(Prompt(name, (1, 2), text), ((3,),), 0)


def found(reference: Item, test: Item) -> str | None:
    """What a reference is found to be, `"equal"`, `"near"` or nothing."""
    kept, report = without_test_items([reference], [item("other", "Which is it?", ["no", "yes"]), test])
    assert report.kept == len(kept) == 1 - report.equal - report.near
    assert all(pair[:2] == (reference.prompt.id, test.prompt.id) for pair in report.pairs)
    return report.pairs[0][2] if report.pairs else None


SAME = [
    QUESTION,
    QUESTION.upper(),
    f"  {QUESTION} ".replace(" ", "  "),
    QUESTION.replace(";", " — ").replace("?", "？"),
    QUESTION.replace("old", "o\N{LATIN SMALL LIGATURE FL}d".replace("ﬂ", "l")),
    QUESTION.replace("fires", "\N{LATIN SMALL LIGATURE FI}res"),
]


@pytest.mark.parametrize("question", SAME)
def test_case_white_space_and_punctuation_make_no_difference(question):
    assert found(item("r", question), item("t", QUESTION)) == "equal"


NEAR = {
    "one word": (QUESTION.replace("potter", "baker"), CHOICES),
    "one word left out": (QUESTION.replace("old ", ""), CHOICES),
    "a number": (QUESTION.replace("24", "36"), CHOICES),
    "two numbers": (QUESTION.replace("24", "36").replace("6 of", "9 of"), CHOICES),
    "the order of the choices": (QUESTION, CHOICES[::-1]),
    "the choices of a long question": (QUESTION, ["blue", "red", "green", "white"]),
    "a choice": (QUESTION, [*CHOICES[:3], "five times"]),
    "an introduction": (f"Read this with care, and then answer in your own words. {QUESTION}", CHOICES),
}


@pytest.mark.parametrize("what", NEAR)
def test_nearly_equal_items_are_found_in_either_direction(what):
    changed, asked = item("r", *NEAR[what]), item("t", QUESTION)
    assert found(changed, asked) == "near"
    assert found(item("r", QUESTION), item("t", *NEAR[what])) == "near"


def test_the_choices_of_a_short_question_may_be_in_another_order():
    assert found(item("r", SHORT, CITIES[::-1]), item("t", SHORT, CITIES)) == "near"


OTHER = {
    "another country": (SHORT.replace("France", "Spain"), CITIES),
    "the same stem about other things": (SHORT.replace("France", "it"), ["red", "blue", "green", "grey"]),
    "a question of the same subject": ("How many bowls fit in a kiln?", CHOICES),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_questions_are_kept(what):
    assert found(item("r", *OTHER[what]), item("t", SHORT, CITIES)) is None


def test_another_name_in_the_same_template_is_another_question():
    question = "In which year did the council of Bruges allow the trade with raw wool from the northern islands?"
    other = question.replace("Bruges", "Lyon").replace("raw wool", "old wine")
    assert found(item("r", other, []), item("t", question, [])) is None


def test_a_short_stem_with_other_choices_is_another_question():
    stem = "Which of the following is true?"
    assert found(item("r", stem, ["tin melts", "iron floats"]), item("t", stem, ["salt burns", "gold rusts"])) is None


def test_signs_of_arithmetic_count():
    assert found(item("r", "2 + 3", []), item("t", "2 - 3", [])) is None
    assert found(item("r", "2+3", []), item("t", "2 + 3", [])) == "equal"
    assert found(item("r", "What is 2 + 3?", []), item("t", "What is 4 + 5?", [])) is None


def test_single_words_of_a_question_in_a_long_text_are_no_copy():
    words = QUESTION.split()
    scattered = " and so on and on ".join(words)
    assert found(item("r", QUESTION, []), item("t", scattered, [])) is None


def test_texts_without_words_are_kept():
    kept, report = without_test_items([item("r", "", [])], [item("t", "", [])])
    assert len(kept) == 1 and report.pairs == ()


def test_the_order_stays_and_the_counts_are_said():
    references = [item("a", "Who made the first clock?", []), item("b", QUESTION), item("c", QUESTION.upper())]
    kept, report = without_test_items(references, [item("t", QUESTION.replace("24", "36"))])
    assert [one.prompt.id for one in kept] == ["a"] and (report.equal, report.near, report.kept) == (0, 2, 1)
    assert (
        report.sentence() == "0 of 3 references equal a test item and 2 nearly do; they are left out, and 1 are kept"
    )


def test_common_phrases_of_many_items_do_not_hide_a_copy():
    tests = [
        item(f"t{i}", f"Which of the following colours has the number {word} in the long list?", [])
        for i, word in enumerate(["north", "south", "east", "west"] * 20)
    ]
    _, report = without_test_items([item("r", QUESTION.replace("potter", "baker"))], [*tests, item("t", QUESTION)])
    assert report.near == 1
