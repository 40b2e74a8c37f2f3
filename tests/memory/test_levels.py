"""What is saved of the references: their text, ids alone, or nothing; and what each can still be used for."""

import logging
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from knnmoe_hf import RoutingMemory, calibrate
from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.data.ngrams import NGRAM, kept_hashes, ngram_hashes
from knnmoe_hf.errors import MemoryFileError
from knnmoe_hf.memory.provenance import LEVELS, Provenance
from knnmoe_hf.training.options import PROVENANCE
from tests.memory.helpers import assert_same, build, full_memory, read_config, rows_for, shards
from tests.memory.test_storage import rewrite
from tests.support.models import PLAIN, random_memory, tiny_model


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def memory(olmoe):
    return with_long_texts(full_memory(olmoe))


def with_long_texts(memory: RoutingMemory, length: int = 60) -> RoutingMemory:
    """The memory with longer texts, of which each has hashes that are kept."""
    known, generator = memory.provenance, torch.Generator().manual_seed(5)
    tokens = {id: torch.randint(96, (length,), generator=generator) for id in known.tokens()}
    columns = (known.example_ids, known.positions, known.nll_before, known.nll_after)
    return type(memory)(
        memory.config, memory.layers, memory.origin, Provenance.build(*columns, tokens), memory.tokenizer
    )


def saved(memory, folder, **options) -> RoutingMemory:
    memory.save_pretrained(folder, **options)
    return RoutingMemory.from_pretrained(folder)


def test_text_is_saved_unless_something_else_is_asked_for(memory, tmp_path):
    assert LEVELS == PROVENANCE
    for name, options in (("default", {}), ("text", {"provenance": "text"})):
        assert_same(saved(memory, tmp_path / name, **options), memory)
        assert RoutingMemory.from_pretrained(tmp_path / name).provenance.has_text


def test_ids_keep_examples_and_positions_and_nothing_that_tells_a_token(memory, tmp_path):
    loaded = saved(memory, tmp_path, provenance="ids")
    kept, whole = loaded.provenance, memory.provenance
    for name in ("example_ids", "positions", "examples"):
        assert torch.equal(getattr(kept, name), getattr(whole, name))
    assert not kept.has_text and kept.tokens() == {} and len(kept.token_ids) == 0
    assert loaded.origin.reference_set_hash is None
    # an NLL is that of one token in the base model's vocabulary: it would give the text away
    assert not kept.nll_before.any() and not kept.nll_after.any()
    for id, hashes in kept.hashes().items():
        assert hashes.tolist() == sorted(set(kept_hashes(ngram_hashes(whole.tokens()[id])).tolist()))
    assert 0 < len(kept.ngrams) < 4 * (60 - NGRAM + 1) / 2
    stored = {name: tensor for path in shards(tmp_path) for name, tensor in load_file(path).items()}
    assert stored["provenance.token_ids"].numel() == 0 and not stored["provenance.offsets"].any()
    assert memory.provenance.has_text and memory.origin.reference_set_hash is not None
    for layer, rows in loaded.layers.items():
        assert torch.equal(rows.key_codes, memory.layers[layer].key_codes)


def test_ids_saved_again_are_the_same_bytes_and_text_cannot_be_had_back(memory, tmp_path):
    loaded = saved(memory, tmp_path / "one", provenance="ids")
    assert_same(saved(loaded, tmp_path / "two"), loaded)  # all that there is
    assert_same(saved(loaded, tmp_path / "three", provenance="ids"), loaded)
    assert saved(loaded, tmp_path / "four", provenance="none").provenance is None
    files = [sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]
    for poor in (loaded, RoutingMemory.from_pretrained(tmp_path / "four")):
        with pytest.raises(ValueError, match="provenance='text' is not possible: this memory has no text") as caught:
            poor.save_pretrained(tmp_path / "five", provenance="text")
        assert "\n" not in str(caught.value) and not (tmp_path / "five").exists()


def test_rows_given_as_tensors_have_no_text_but_an_empty_memory_lacks_none(olmoe, memory, tmp_path):
    bare = random_memory(olmoe)
    assert_same(saved(bare, tmp_path / "bare"), bare)
    assert saved(bare, tmp_path / "ids", provenance="ids").provenance.example_ids.tolist() == list(range(40))
    with pytest.raises(ValueError, match="has no text"):
        bare.save_pretrained(tmp_path / "text", provenance="text")
    nothing = memory.select_rows(min_gain=100.0)
    assert len(saved(nothing, tmp_path / "empty", provenance="text")) == 0


@pytest.mark.parametrize("level", ["texts", "TEXT", "", 3, 0, ["ids"]], ids=str)
def test_any_other_level_is_refused_before_anything_is_written(memory, tmp_path, level):
    for call in (
        lambda: memory.save_pretrained(tmp_path / "out", provenance=level),
        lambda: memory.push_to_hub("me/memory", provenance=level),
    ):
        with pytest.raises(ValueError, match=f"provenance={re.escape(repr(level))} is not allowed.*text, ids, none"):
            call()
    assert not (tmp_path / "out").exists()


# what is said of it


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_saving_text_is_said_once_with_the_way_to_leave_it_out(memory, tmp_path, caplog):
    memory.save_pretrained(tmp_path / "out")
    (text,) = warnings(caplog)
    assert "training text" in text and "4 examples, 240 tokens" in text and str(tmp_path / "out") in text
    assert "'ids'" in text and "'none'" in text and "\n" not in text


@pytest.mark.parametrize("level", ["ids", "none"])
def test_nothing_is_said_where_no_text_is_saved(memory, tmp_path, caplog, level):
    memory.save_pretrained(tmp_path, provenance=level)
    assert warnings(caplog) == []


def test_the_card_says_what_is_inside(olmoe, memory, tmp_path):
    cards = {}
    for level in LEVELS:
        memory.save_pretrained(tmp_path / level, provenance=level)
        cards[level] = " ".join((tmp_path / level / "README.md").read_text().split())
        assert "Keys are hidden states of the references" in cards[level] and "may recover text" in cards[level]
    assert "**The training text is inside**" in cards["text"] and "4 examples, 240 tokens" in cards["text"]
    assert 'provenance="ids"' in cards["text"] and "not inside" not in cards["text"]
    assert "The training text is not inside" in cards["ids"] and "hashes of a quarter" in cards["ids"]
    assert "The training text is not inside" in cards["none"] and "nor what example" in cards["none"]
    random_memory(olmoe).save_pretrained(tmp_path / "tensors")
    card = " ".join((tmp_path / "tensors" / "README.md").read_text().split())
    assert "The training text is not inside" in card and "hashes" not in card


# pushing


@pytest.fixture
def pushed(hub) -> Callable[..., RoutingMemory]:
    """Pushes a memory, and gives what is in the repository then."""

    def push(memory: RoutingMemory, **options) -> RoutingMemory:
        commit = memory.push_to_hub("me/memory", **options)
        return RoutingMemory.from_pretrained("me/memory", revision=commit.oid)

    return push


def test_text_is_pushed_only_if_it_is_asked_for_by_name(memory, pushed, caplog):
    uploaded = pushed(memory)
    assert not uploaded.provenance.has_text and len(uploaded.provenance.ngrams) and warnings(caplog) == []
    assert pushed(memory, provenance="none").provenance is None
    assert pushed(memory, provenance="text").provenance.has_text
    (text,) = warnings(caplog)
    assert "me/memory holds the training text" in text


def test_what_has_less_than_ids_is_pushed_as_it_is(memory, olmoe, pushed, tmp_path):
    uploaded = pushed(saved(memory, tmp_path, provenance="none"))
    assert uploaded.provenance is None
    with pytest.raises(ValueError, match="has no text"):
        uploaded.push_to_hub("me/memory", provenance="text")


# editing


@pytest.fixture(scope="module")
def ids(memory, tmp_path_factory):
    return saved(memory, tmp_path_factory.mktemp("ids"), provenance="ids")


def test_removing_examples_keeps_the_hashes_of_the_others(ids, memory, tmp_path):
    fewer = ids.remove_examples([1])
    assert len(fewer) == 30 and sorted(fewer.provenance.hashes()) == [0, 2, 3]
    for id, hashes in fewer.provenance.hashes().items():
        assert torch.equal(hashes, ids.provenance.hashes()[id]) and len(hashes)
    assert_same(saved(fewer, tmp_path), fewer)
    expected = memory.remove_examples([1]).provenance.without_text()
    assert torch.equal(fewer.provenance.ngrams, expected.ngrams)


def test_taking_and_recoding_keep_hashes(ids, olmoe):
    taken = ids.take(ids.provenance.example_ids == 2)
    assert list(taken.provenance.hashes()) == [2] and taken.provenance.sizes[0] == 1
    again = ids.recoded(olmoe, key_dtype="float16").provenance
    assert torch.equal(again.ngrams, ids.provenance.ngrams)


def test_what_needs_text_says_what_is_missing(ids, olmoe, caplog):
    with pytest.raises(ValueError, match="gains of this memory's rows are not recorded.*provenance='text'"):
        ids.select_rows(max_rows=3)
    assert hold_out(ids) is None
    calibrate(olmoe, ids, {"other": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]})
    assert "no text of the references" in caplog.text and "provenance='ids'" in caplog.text


def test_merging_ids_takes_shared_examples_once_and_renumbers_others(ids, olmoe, tmp_path):
    assert len(ids.merge(ids)) == 40
    stranger = with_long_texts(full_memory(olmoe, examples=(3, 9), seed=8), 50)
    stranger = saved(stranger, tmp_path, provenance="ids")
    merged = ids.merge(stranger)
    assert len(merged) == 60 and sorted(merged.provenance.hashes()) == [0, 1, 2, 3, 9, 10]
    assert torch.equal(merged.provenance.hashes()[10], stranger.provenance.hashes()[3])
    assert_same(saved(merged, tmp_path / "merged"), merged)


def test_merging_ids_with_text_gives_ids_and_says_so(ids, memory, caplog):
    halves = memory.remove_examples([0, 1]), ids.remove_examples([2])
    for one, other in (halves, halves[::-1]):
        caplog.clear()
        merged = one.merge(other)  # 3 is in both, and is recognised by its hashes
        assert len(merged) == 40 and sorted(merged.provenance.hashes()) == [0, 1, 2, 3]
        assert not merged.provenance.has_text and not merged.provenance.nll_before.any()
        assert sum("keeps ids alone" in text for text in warnings(caplog)) == 1
    assert not ids.merge(memory).provenance.has_text
    assert memory.merge(ids).provenance.has_text  # no row of the other one is taken


def test_texts_too_short_for_a_hash_are_never_mistaken_for_one_another(olmoe, tmp_path):
    short = with_long_texts(full_memory(olmoe), NGRAM - 1)
    loaded = saved(short, tmp_path, provenance="ids")
    assert loaded.provenance.sizes == (4, 0, 0) and "ngrams" not in str(read_config(tmp_path)["memory"]["files"])
    merged = loaded.merge(loaded)
    assert len(merged) == 80 and len(merged.provenance.example_ids.unique()) == 8


def test_merging_text_with_rows_of_tensors_keeps_the_text(olmoe, memory, caplog):
    bare = build(olmoe, *rows_for(), **PLAIN)
    merged = memory.merge(bare)
    assert len(merged.provenance.tokens()) == 4 and len(merged) == 46 and warnings(caplog) == []


@pytest.mark.parametrize("name", ["ngram_offsets", "offsets"])
def test_offsets_that_divide_nothing_are_refused(ids, tmp_path, name):
    ids.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[f"provenance.{name}"].add_(1))
    with pytest.raises(MemoryFileError, match=f"provenance.{name} do not divide"):
        RoutingMemory.from_pretrained(tmp_path)
