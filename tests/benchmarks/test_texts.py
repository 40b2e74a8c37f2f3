"""References, validation and test windows do not mix."""

import pytest

from benchmarks import texts as module
from benchmarks.texts import IN_DOMAIN, KINDS, OFF_STEP, WINDOW, LabTexts, spread, token_digest
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture
def texts(monkeypatch) -> LabTexts:
    def documents(kind: str, split: str) -> list[str]:
        return [f"{kind} {split} {i} ".ljust(WINDOW - 1, "abcdefgh"[i % 8]) for i in range(100)]  # a window each

    monkeypatch.setattr(module, "documents", documents)
    return LabTexts(byte_tokenizer(), test=12)


def tokens(rows: list[dict]) -> list[tuple]:
    return [tuple(row["input_ids"]) for row in rows]


def test_more_references_begin_with_fewer_and_another_seed_draws_others(texts):
    few, many = (tokens(texts.references("topics", 0, count)) for count in (5, 20))
    assert many[:5] == few and len(set(many)) == 20
    assert tokens(texts.references("topics", 0, 5)) == few
    assert tokens(texts.references("topics", 1, 5)) != few
    assert len(texts.references("topics", 0, 1000)) == 90


def test_no_reference_is_for_validation(texts):
    validation = set(tokens(texts.validation("headers")))
    assert len(validation) == 10
    assert not validation & set(tokens(texts.references("headers", 2, 1000)))


def test_test_windows_are_of_the_whole_split(texts):
    decoded = [texts.tokenizer.decode(row["input_ids"]) for row in texts.test("notices")]
    assert len(decoded) == 12 and all(text.startswith("notices test") for text in decoded)
    assert [int(text.split()[2]) for text in decoded] == [i * 100 // 12 for i in range(12)]


def test_every_method_is_judged_on_all_kinds(texts):
    for kind in IN_DOMAIN:
        judged = texts.judged_on(kind)
        assert list(judged)[0] == kind and set(judged) == set(KINDS)
        assert all(
            tokens(rows) == tokens(texts.test(text))[:: 1 if text == kind else OFF_STEP]
            for text, rows in judged.items()
        )


def test_spread_takes_no_more_than_there_is():
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([], 3) == []


def test_a_digest_is_of_the_tokens_in_their_order(texts):
    rows = texts.test("topics")
    assert token_digest(rows) == token_digest(list(rows)) != token_digest(rows[::-1])
