"""Test text that is among the references is found in any chunking, with text and with hashes; other text is not."""

from dataclasses import replace

import datasets
import pytest
import torch

from knnmoe_hf.evaluation import Overlap, without_overlap
from knnmoe_hf.evaluation.references import COMMON, References
from knnmoe_hf.memory.provenance import Provenance
from tests.support.models import random_memory, tiny_model

IGNORED = -100


def document(length: int, seed: int = 0, vocabulary: int = 5000) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cut(ids: list[int], length: int, offset: int = 0) -> list[list[int]]:
    return [ids[start : start + length] for start in range(offset, len(ids), length)]


def row(ids: list[int], first_target: int = 0) -> dict:
    """An example whose targets begin at a token."""
    labels = [IGNORED] * first_target + ids[first_target:]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "example_id": 0}


def provenance(examples: list[list[int]]) -> Provenance:
    ids, nothing = torch.arange(len(examples)), torch.zeros(len(examples))
    return Provenance.build(ids, ids, nothing, nothing, {i: torch.tensor(tokens) for i, tokens in enumerate(examples)})


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


def memory_of(model, examples: list[list[int]], level: str = "text"):
    known = provenance(examples)
    known = {"text": known, "ids": known.without_text(), "none": None}[level]
    return replace(random_memory(model, rows=len(examples)), provenance=known)


TEXT, QUARTER = "text", "ids"
BOTH = pytest.mark.parametrize("level", [TEXT, QUARTER])
DOCUMENT = document(4000)
NEW = document(4000, seed=1)


@BOTH
@pytest.mark.parametrize("length, offset", [(256, 0), (256, 100), (1000, 7), (64, 3), (50, 31), (4000, 0)])
def test_the_references_in_any_chunking_are_left_out(olmoe, level, length, offset):
    memory = memory_of(olmoe, cut(DOCUMENT, 256), level)
    copies = [row(ids) for ids in cut(DOCUMENT, length, offset) if len(ids) >= 50]
    new = [row(ids) for ids in cut(NEW, length, offset) if len(ids) >= 50]
    kept, overlap = without_overlap(memory, copies + new)
    assert kept == new and overlap.checked
    assert (overlap.windows, overlap.overlapping, overlap.left_out) == (len(copies + new), len(copies), len(copies))
    assert overlap.scored == len(new)
    assert overlap.share == pytest.approx(0.5, abs=0.05)


@BOTH
def test_a_window_of_which_half_is_copied_is_left_out(olmoe, level):
    memory = memory_of(olmoe, cut(DOCUMENT, 256), level)
    rows = [row(NEW[i : i + 128] + DOCUMENT[i : i + 128]) for i in range(0, 3000, 200)]
    kept, overlap = without_overlap(memory, rows)
    assert kept == [] and overlap.left_out == len(rows)
    assert overlap.share == pytest.approx(0.48, abs=0.05)


@BOTH
def test_copies_with_a_changed_token_here_and_there_are_left_out(olmoe, level):
    memory = memory_of(olmoe, cut(DOCUMENT, 256), level)
    changed = [token if place % 15 else 4999 - token for place, token in enumerate(DOCUMENT)]
    rows = [row(ids) for ids in cut(changed, 256) if len(ids) == 256]
    assert without_overlap(memory, rows)[0] == []


@pytest.mark.parametrize("length", [13, 16, 20, 30])
def test_lines_that_were_cut_within_words_are_left_out(olmoe, length):
    """Their first and last token are others than in the reference."""
    memory = memory_of(olmoe, cut(DOCUMENT, 256))
    pieces = [DOCUMENT[i : i + length] for start in range(0, 3840, 256) for i in range(start, start + 220, length)]
    rows = [row([5001, *piece[1:-1], 5002]) for piece in pieces]
    assert without_overlap(memory, rows)[0] == []


@pytest.mark.parametrize("length", [2, 3, 7, 8, 12, 20])
def test_short_examples_are_found_if_they_are_references(olmoe, length):
    rows = cut(document(40 * length), length)
    new = cut(document(40 * length, seed=9), length)
    kept, overlap = without_overlap(memory_of(olmoe, rows), [row(ids) for ids in rows + new])
    assert [one["input_ids"] for one in kept] == new and overlap.unchecked == 0


def test_a_short_part_of_a_reference_is_found_but_a_few_tokens_are_in_any_text(olmoe):
    memory = memory_of(olmoe, cut(DOCUMENT, 256))
    assert without_overlap(memory, [row(DOCUMENT[300:306])])[0] == []
    assert len(without_overlap(memory, [row(DOCUMENT[300:304])])[0]) == 1


def test_without_text_examples_shorter_than_a_run_cannot_be_checked(olmoe):
    short, longer = cut(document(70), 7), cut(DOCUMENT, 256)
    kept, overlap = without_overlap(memory_of(olmoe, short + longer, QUARTER), [row(ids) for ids in short + longer])
    assert [one["input_ids"] for one in kept] == short
    assert overlap.unchecked == 10 and "10 windows could not be checked" in overlap.sentence()
    alone = without_overlap(memory_of(olmoe, short, QUARTER), [row(ids) for ids in short])[1]
    assert not alone.checked and alone.share is None and alone.unchecked == 10


@BOTH
def test_a_prompt_that_rows_share_is_no_overlap(olmoe, level):
    prompt = document(200, seed=5)
    references = [prompt + document(60, seed=100 + i) for i in range(20)]
    test = [row(prompt + document(60, seed=500 + i), first_target=200) for i in range(20)]
    memory = memory_of(olmoe, references, level)
    kept, overlap = without_overlap(memory, test)
    assert kept is test and overlap.share == 0
    same = [row(ids, first_target=200) for ids in references]
    assert without_overlap(memory, same)[0] == []


@BOTH
def test_the_same_short_answer_to_another_question_is_no_overlap(olmoe, level):
    system, closing = document(100, seed=5), document(20, seed=6)
    answers = [[11, 12, 13, 1], [21, 1]]

    def asked(seed: int) -> dict:
        ids = system + document(30, seed=seed) + closing + answers[seed % 2]
        return row(ids, first_target=len(ids) - len(answers[seed % 2]))

    references = [asked(seed) for seed in range(100, 140)]
    memory = memory_of(olmoe, [one["input_ids"] for one in references], level)
    new = [asked(seed) for seed in range(200, 240)]
    assert without_overlap(memory, new)[0] is new
    again = [asked(seed) for seed in range(100, 140)]
    _, overlap = without_overlap(memory, again)
    assert overlap.overlapping == overlap.windows - overlap.unchecked > 0
    # the same question with another answer
    other = [row(one["input_ids"][:-2] + [77, 78, 79], first_target=one["labels"].index(1) - 1) for one in again]
    assert without_overlap(memory, other)[1].overlapping <= len(other) // 10


@BOTH
def test_rows_of_one_template_are_no_overlap(olmoe, level):
    template = [document(14, seed=i) for i in range(4)]

    def filled(seed: int) -> list[int]:
        values = cut(document(12, seed=seed), 3)
        return [token for part, value in zip(template, values) for token in part + value]

    memory = memory_of(olmoe, [filled(seed) for seed in range(1000, 1040)], level)
    new = [row(filled(seed)) for seed in range(2000, 2040)]
    kept, overlap = without_overlap(memory, new)
    assert kept is new and overlap.share > 0.3
    assert without_overlap(memory, [row(filled(seed)) for seed in range(1000, 1040)])[1].overlapping >= 39


@BOTH
@pytest.mark.parametrize("copies", [2, 2 * COMMON])
def test_text_that_is_among_the_references_many_times_is_no_template(olmoe, level, copies):
    same = cut(DOCUMENT, 256) * copies
    shifted = [ids for copy in range(copies) for ids in cut(DOCUMENT, 256, offset=31 * copy)]
    for references in (same, shifted):
        kept, _ = without_overlap(memory_of(olmoe, references, level), [row(ids) for ids in cut(DOCUMENT, 200, 50)])
        assert kept == []
    half = [row(NEW[i : i + 128] + DOCUMENT[i : i + 128]) for i in range(0, 3000, 200)]
    assert without_overlap(memory_of(olmoe, same, level), half)[0] == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_text(olmoe, side):
    def padded(ids: list[int]) -> dict:
        filler, real = [0] * 50, [1] * len(ids)
        ids, mask = (filler + ids, filler + real) if side == "left" else (ids + filler, real + filler)
        labels = [token if real else IGNORED for token, real in zip(ids, mask)]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "example_id": 0}

    memory = memory_of(olmoe, cut(DOCUMENT, 200) + [[0] * 100])
    assert without_overlap(memory, [padded(ids) for ids in cut(NEW, 12)[:10]])[1].share == 0
    copies = without_overlap(memory, [padded(ids) for ids in cut(DOCUMENT, 20)[:10]])
    assert copies[0] == [] and copies[1].share == 1


def test_rows_may_be_tensors_and_of_a_data_set(olmoe):
    memory = memory_of(olmoe, cut(DOCUMENT, 256))
    rows = [row(ids) for ids in (DOCUMENT[50:150], NEW[50:150])]
    tensors = [{name: torch.tensor(value) for name, value in one.items()} for one in rows]
    assert [one["input_ids"].tolist() for one in without_overlap(memory, tensors)[0]] == [NEW[50:150]]
    kept, _ = without_overlap(memory, datasets.Dataset.from_list(rows))
    assert len(kept) == 1 and kept[0]["input_ids"] == NEW[50:150]


def test_rows_without_targets_are_no_windows(olmoe):
    rows = [row(DOCUMENT[:60], first_target=60), row([]), row([5]), row(NEW[:60])]
    kept, overlap = without_overlap(memory_of(olmoe, cut(DOCUMENT, 256)), rows)
    assert kept is rows and overlap.windows == 1
    assert without_overlap(memory_of(olmoe, cut(DOCUMENT, 256)), [])[1].windows == 0


def test_targets_before_the_end_of_the_first_run_are_looked_up_too(olmoe):
    ids = document(30)
    early = row(ids) | {"labels": ids[:4] + [IGNORED] * 26}
    assert without_overlap(memory_of(olmoe, [ids]), [early])[0] == []
    assert len(without_overlap(memory_of(olmoe, [NEW[:60]]), [early])[0]) == 1


def test_allowed_overlap_is_counted_and_nothing_is_left_out(olmoe):
    rows = [row(ids) for ids in cut(DOCUMENT, 200)]
    kept, overlap = without_overlap(memory_of(olmoe, cut(DOCUMENT, 256)), rows, allowed=True)
    assert kept is rows and overlap.overlapping == 20 and overlap.left_out == 0 and overlap.scored == 20
    assert "scored all the same" in overlap.sentence()
    overlap.check_any_left()


def test_a_memory_without_provenance_or_of_rows_alone_cannot_be_checked(olmoe):
    rows = [row(ids) for ids in cut(DOCUMENT, 256)]
    for memory in (memory_of(olmoe, cut(DOCUMENT, 256), "none"), random_memory(olmoe)):
        kept, overlap = without_overlap(memory, rows)
        assert kept is rows and not overlap.checked and overlap.share is None and overlap.unchecked == 16
        assert "could not be checked" in overlap.sentence()
        overlap.check_any_left()


def test_references_without_text_among_others_are_said(olmoe):
    known = provenance(cut(DOCUMENT, 256))
    both = known.joined(Provenance.of_rows(torch.tensor([50, 50, 51])))
    memory = replace(random_memory(olmoe, rows=19), provenance=both)
    overlap = without_overlap(memory, [row(DOCUMENT[10:90]), row(NEW[10:90])])[1]
    assert overlap.left_out == 1 and overlap.unknown_references == 2
    assert "2 references could not be looked up" in overlap.sentence()


def test_what_was_found_is_a_sentence_and_text_of_which_nothing_is_left_is_refused():
    some = Overlap(12, 3, 3, 0.271, 0, 0)
    assert some.sentence() == (
        "3 of the 12 windows of test text overlap the references and are left out (27.1 % of all runs of 8 tokens are "
        "in there)."
    )
    assert Overlap(12, 0, 0, 0.004, 0, 0).sentence().startswith("none of the 12 windows of test text overlap")
    some.check_any_left()
    with pytest.raises(ValueError, match=r"holds all 12 windows of law.txt: give held-out text, or .*allow_overlap"):
        Overlap(12, 12, 12, 1.0, 0, 0).check_any_left("law.txt")


def test_references_may_be_rows_and_rows_are_looked_up_alike_one_by_one():
    references = References.of_rows([row(ids) for ids in cut(DOCUMENT, 256)])
    rows = [row(ids) for ids in [*cut(DOCUMENT, 100), *cut(NEW, 100), NEW[:5], DOCUMENT[9:15], []]] * 30
    together = references.look_up(rows)
    assert references.overlapping(rows).tolist() == ([True] * 40 + [False] * 41 + [True, False]) * 30
    for index in (0, 45, 80, 81, 82, len(rows) - 1):
        assert [part.tolist() for part in references.look_up([rows[index]])] == [
            [part[index].item()] for part in together
        ]
