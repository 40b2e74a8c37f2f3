"""The words by which questions are compared, and the halves of a benchmark with one split."""

from knnmoe_hf.tasks.splits import is_reference, normalised
from tests.tasks.benchmarks import questions


def test_normalised_text_keeps_words_and_signs_of_logic():
    assert normalised(" The  GATE,\nof—Layer 3! ") == "the gate of layer 3"
    assert normalised("Covid-19 and 5 − 3 = 2") == "covid 19 and 5 - 3 = 2"
    assert normalised("ＡＢＣ ﬁre") == "abc fire"
    assert len({normalised(f"P {sign} Q") for sign in "∨∧⊃↔⇒≡"} | {normalised("¬P Q"), normalised("P Q")}) == 8


def test_halves_depend_on_the_words_alone():
    texts = questions(35)
    share = sum(map(is_reference, texts)) / len(texts)
    assert 0.3 < share < 0.7
    assert all(is_reference(text) == is_reference(f"  {text.upper()} ") for text in texts)


def test_the_halves_stay_what_they_were():
    # published figures depend on them
    assert [is_reference(text) for text in ("a", "b", "c", "d", "e", "f")] == [True, True, True, True, False, False]
