"""The token that follows each row: from the text or stored, through edits, in files, and what is said of it."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, get_memory
from knnmoe_hf.errors import MemoryMismatchError
from knnmoe_hf.memory.next_tokens import TENSOR
from knnmoe_hf.models.attach import prepare
from tests.memory.helpers import (
    assert_same,
    calibration_record,
    edit_config,
    full_memory,
    read_config,
    refused,
    rows_for,
    shards,
)
from tests.memory.manifest.helpers import as_version_2, as_version_3, as_version_4
from tests.memory.test_levels import pushed, warnings  # noqa: F401
from tests.memory.test_storage import rewrite
from tests.memory.test_verdict import verdict
from tests.support.attaching import attached
from tests.support.models import PLAIN, tiny_model

NEXT = torch.arange(40, dtype=torch.int32) * 2


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def memory(olmoe) -> RoutingMemory:
    return full_memory(olmoe)


@pytest.fixture(scope="module")
def stored(memory, tmp_path_factory) -> RoutingMemory:
    """The same rows without text, but with the token that follows each."""
    return saved(memory, tmp_path_factory.mktemp("stored"), provenance=False, next_tokens=True)


def saved(memory, folder, **options) -> RoutingMemory:
    memory.save_pretrained(folder, **options)
    return RoutingMemory.from_pretrained(folder)


def in_text(memory) -> torch.Tensor:
    """The token after each row, one at a time."""
    known = memory.provenance
    tokens = known.tokens()
    pairs = zip(known.example_ids.tolist(), known.positions.tolist())
    return torch.tensor([int(tokens[example][position + 1]) for example, position in pairs], dtype=torch.int32)


def assert_next(memory, tokens) -> None:
    found = memory.next_tokens
    assert found.dtype == torch.int32 and torch.equal(found, tokens)


# where they come from


def test_the_text_of_the_references_says_which_token_follows_each_row(memory):
    assert_next(memory, in_text(memory))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert_next(replace(memory, provenance=memory.provenance.select(shuffled)), in_text(memory)[shuffled])


@pytest.mark.parametrize(
    "change, count",
    [
        (lambda known: replace(known, positions=known.positions.clone().index_fill(0, torch.tensor([3]), -1)), 1),
        (lambda known: replace(known, positions=known.positions + 1), 4),  # the last token of each example
        (lambda known: replace(known, example_ids=known.example_ids + 1), 10),  # the text of one is not there
    ],
)
def test_rows_without_a_next_token_leave_the_memory_without_any(memory, olmoe, change, count, tmp_path):
    broken = replace(memory, provenance=change(memory.provenance))
    assert broken.next_tokens is None
    with pytest.raises(ValueError, match=rf"next_tokens=True is not possible.* {count} of this memory's 40 rows") as e:
        broken.save_pretrained(tmp_path / "new", next_tokens=True)
    assert "\n" not in str(e.value) and not (tmp_path / "new").exists()
    with pytest.raises(MemoryMismatchError, match=rf"{count} of this memory's 40 rows have no next token"):
        broken.check_recall("both")


def test_rows_of_tensors_have_the_next_tokens_that_are_given(olmoe, tmp_path):
    keys, values = rows_for(40)
    for given in (NEXT, NEXT.tolist(), NEXT.long(), iter(NEXT.tolist())):
        made = RoutingMemory.from_rows(KNNMoEConfig(recall="both", **PLAIN), keys, values, olmoe, next_tokens=given)
        assert_next(made, NEXT)
    loaded = saved(made, tmp_path)
    assert_same(loaded, made)
    assert_next(loaded, NEXT)
    assert RoutingMemory.from_rows(KNNMoEConfig(**PLAIN), keys, values, olmoe).next_tokens is None


@pytest.mark.parametrize(
    "given",
    [
        NEXT[:-1],
        NEXT.float(),
        NEXT[None],
        NEXT - 1,
        NEXT.bool(),
        NEXT.long() + 2**40,
        "abc",
        5,
        ["a"] * 40,
        [1.5] * 40,
    ],
    ids=str,
)
def test_other_next_tokens_are_refused_in_one_sentence(olmoe, given):
    with pytest.raises(ValueError, match="^next_tokens") as caught:
        RoutingMemory.from_rows(KNNMoEConfig(**PLAIN), *rows_for(40), olmoe, next_tokens=given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# what is saved


@pytest.mark.parametrize("level", ["ids", "none", False])
def test_they_take_four_bytes_a_row_where_the_text_is_left_out(memory, tmp_path, level):
    loaded = saved(memory, tmp_path / "with", provenance=level, next_tokens=True)
    assert_next(loaded, memory.next_tokens)
    assert loaded.stored_next_tokens.nbytes == 160 and read_config(tmp_path / "with")["memory"]["next_tokens"] is True
    assert loaded.provenance is None or not loaded.provenance.has_text
    assert_same(saved(loaded, tmp_path / "again"), loaded)  # all that there is
    files = [sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("with", "again")]
    assert files[0] == files[1]
    without = saved(memory, tmp_path / "without", provenance=level)
    assert without.next_tokens is None and TENSOR not in load_file(*shards(tmp_path / "without"))


@pytest.mark.parametrize("asked", [{}, {"provenance": True}, {"next_tokens": True}, {"next_tokens": False}], ids=str)
def test_the_text_has_them_and_nothing_is_stored_beside_it(memory, tmp_path, asked):
    loaded = saved(memory, tmp_path, **asked)
    assert loaded.stored_next_tokens is None and TENSOR not in load_file(*shards(tmp_path))
    assert_next(loaded, memory.next_tokens)


def test_stored_ones_stay_unless_provenance_or_next_tokens_say_otherwise(stored, tmp_path):
    assert_next(saved(stored, tmp_path / "default"), stored.next_tokens)
    for number, asked in enumerate(({"provenance": False}, {"provenance": "ids"}, {"next_tokens": False})):
        assert saved(stored, tmp_path / str(number), **asked).next_tokens is None


@pytest.mark.parametrize("value", ["yes", 1, 0, [True]], ids=str)
def test_another_value_of_next_tokens_is_refused(memory, tmp_path, value):
    with pytest.raises(ValueError, match="next_tokens=.* is not allowed: use True, False or None"):
        memory.save_pretrained(tmp_path / "new", next_tokens=value)
    assert not (tmp_path / "new").exists()


def test_only_what_is_asked_for_is_pushed(memory, stored, pushed, caplog):  # noqa: F811
    assert pushed(memory).next_tokens is None and pushed(stored).next_tokens is None and warnings(caplog) == []
    uploaded = pushed(memory, next_tokens=True)
    assert not uploaded.provenance.has_text
    assert_next(uploaded, memory.next_tokens)
    (text,) = warnings(caplog)
    assert "me/memory holds the token that follows each of its 40 rows" in text and "training text" in text


def test_a_save_of_next_tokens_warns_that_they_are_the_text(memory, stored, tmp_path, caplog):
    memory.save_pretrained(tmp_path / "one", provenance=False, next_tokens=True)
    stored.save_pretrained(tmp_path / "two")
    for text, name in zip(warnings(caplog), ("one", "two"), strict=True):
        assert str(tmp_path / name) in text and "are the training text" in text and "next_tokens=False" in text
        assert "\n" not in text


def test_the_card_says_whether_they_are_inside_and_what_that_means(memory, tmp_path):
    levels = {"text": {}, "ids": {"provenance": "ids"}, "none": {"provenance": False}}
    levels |= {f"{name} with": asked | {"next_tokens": True} for name, asked in levels.items()}
    cards = {}
    for name, asked in levels.items():
        memory.save_pretrained(tmp_path / name, **asked)
        cards[name] = " ".join((tmp_path / name / "README.md").read_text().split())
        assert "| recall | `routing` |" in cards[name]
    assert cards["text"] == cards["text with"] and "| next tokens | read from the text" in cards["text"]
    for name in ("ids", "none"):
        assert "| next tokens | not inside" in cards[name] and "The training text is not inside" in cards[name]
        with_them = cards[f"{name} with"]
        assert "The training text is not inside" not in with_them and "**The training text can be read" in with_them
        assert "each of the 40 rows" in with_them and "| next tokens | inside, 0.0 MB" in with_them
    assert "hashes of a quarter" in cards["ids with"] and "cannot be checked" in cards["none with"]


# a memory that holds none


def poor_folder(memory, folder):
    memory.save_pretrained(folder, provenance=False)
    return folder


@pytest.mark.parametrize("recall", ["next_tokens", "both"])
def test_a_memory_without_them_is_refused_where_they_are_needed(memory, olmoe, tmp_path, recall):
    folder = poor_folder(memory, tmp_path / "poor")
    words = (f"recall='{recall}' is not possible", "recall='routing'", "next_tokens=True")
    refused(folder, *words, error=MemoryMismatchError, recall=recall)
    edit_config(folder, lambda config: config.update(recall=recall))
    refused(folder, *words, error=MemoryMismatchError)
    poor = RoutingMemory.from_pretrained(folder, recall="routing")
    poor.config.recall = recall
    for call in (lambda: attach_memory(olmoe, poor), lambda: poor.save_pretrained(tmp_path / "new")):
        with pytest.raises(MemoryMismatchError, match=words[0]) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    poor.config.recall = "routing"
    with pytest.raises(MemoryMismatchError, match=words[0]):
        prepare(olmoe, poor, replace(poor.config.retrieval_options(), recall=recall))
    with attached(olmoe, poor):
        assert len(get_memory(olmoe)) == 40


@pytest.mark.parametrize("asked", [{"provenance": "ids"}, {"provenance": False}], ids=str)
def test_a_memory_that_needs_them_is_not_saved_without(memory, tmp_path, asked, hub):
    both = replace(memory, config=KNNMoEConfig(**memory.config.options() | {"recall": "both"}))
    calls = (
        lambda: both.save_pretrained(tmp_path / "new", **asked),
        lambda: both.save_pretrained(tmp_path / "new", **asked, next_tokens=False),
        lambda: both.push_to_hub("me/memory"),
    )
    for call in calls:
        with pytest.raises(ValueError, match="recall='both' of this memory needs .*next_tokens=True") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists() and not hub.store.repositories
    assert saved(both, tmp_path, **asked, next_tokens=True).config.recall == "both"
    assert saved(both, tmp_path / "text").config.recall == "both"


def test_a_memory_without_rows_lacks_no_next_token(memory, tmp_path):
    nothing = memory.select_rows(min_gain=100.0)
    nothing.config.recall = "both"
    loaded = saved(nothing, tmp_path, provenance=False)
    assert len(loaded) == 0 and len(loaded.next_tokens) == 0


# edits


@pytest.mark.parametrize("kind", ["text", "ids", "none"])
def test_edits_keep_the_next_token_of_each_row(memory, olmoe, tmp_path, kind):
    has = memory if kind == "text" else saved(memory, tmp_path, provenance=kind, next_tokens=True)
    tokens, ids = memory.next_tokens, memory.provenance.example_ids
    keep = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.4
    assert_next(has.take(keep), tokens[keep])
    assert_next(has.take(torch.arange(40) < 7), tokens[:7])
    assert_next(has.recoded(olmoe, key_dtype="float16"), tokens)
    if kind != "none":
        fewer = has.remove_examples([1, 2])
        assert_next(fewer, tokens[(ids != 1) & (ids != 2)])
        assert_next(saved(fewer, tmp_path / "fewer"), fewer.next_tokens)
    if kind == "text":
        best = (memory.provenance.nll_before - memory.provenance.nll_after).topk(9).indices.sort().values
        assert_next(has.select_rows(max_rows=9), tokens[best])


def other_of(olmoe, kind: str, folder) -> RoutingMemory:
    """Of two examples, one of whose ids both memories have."""
    other = full_memory(olmoe, examples=(3, 9), seed=8)
    return other if kind == "text" else saved(other, folder, provenance=kind, next_tokens=True)


@pytest.mark.parametrize(
    "kinds, text", [("text text", True), ("text ids", False), ("ids text", False), ("none none", False)]
)
def test_merged_memories_keep_the_next_tokens_of_both(memory, olmoe, tmp_path, kinds, text):
    first, second = kinds.split()
    mine = memory if first == "text" else saved(memory, tmp_path / "mine", provenance=first, next_tokens=True)
    merged = mine.merge(other := other_of(olmoe, second, tmp_path / "other"))
    assert_next(merged, torch.cat([memory.next_tokens, other.next_tokens]))
    assert (merged.stored_next_tokens is None) == text
    assert_same(saved(merged, tmp_path / "merged"), merged)
    assert_next(RoutingMemory.from_pretrained(tmp_path / "merged"), merged.next_tokens)


def test_text_merged_with_rows_of_tensors_has_the_next_tokens_of_both(memory, olmoe, tmp_path):
    bare = RoutingMemory.from_rows(KNNMoEConfig(**PLAIN), *rows_for(40), olmoe, next_tokens=NEXT)
    merged = memory.merge(bare)
    assert merged.provenance.has_text
    assert_next(merged, torch.cat([memory.next_tokens, NEXT]))
    loaded = saved(merged, tmp_path)
    assert_same(loaded, merged)
    assert_next(loaded, merged.next_tokens)
    assert_next(merged.remove_examples(memory.provenance.example_ids.unique().tolist()), NEXT)


def test_examples_that_both_hold_are_merged_once_with_their_next_tokens(memory):
    assert_next(memory.merge(memory.remove_examples([0])), memory.next_tokens)


@pytest.mark.parametrize("recall", ["routing", "both"])
def test_merging_with_a_memory_that_has_none_leaves_none_and_is_logged(memory, olmoe, caplog, recall):
    has = replace(memory, config=KNNMoEConfig(**memory.config.options() | {"recall": recall}))
    bare = RoutingMemory.from_rows(KNNMoEConfig(**PLAIN), *rows_for(40), olmoe)
    with caplog.at_level(logging.INFO, "knnmoe_hf"):
        assert has.merge(bare).next_tokens is None and bare.merge(memory).next_tokens is None
    assert caplog.text.count("one of the memories has no next tokens") == 2
    assert len(warnings(caplog)) == (recall == "both")
    caplog.clear()
    bare.merge(bare)
    assert "next tokens" not in caplog.text


# files


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t[TENSOR][3].fill_(-1), "next_tokens has indices that are not from 0"),
        (lambda t: t.update({TENSOR: t[TENSOR][:-1].clone()}), "[39] torch.int32 where config.json says [40]"),
        (lambda t: t.update({TENSOR: t[TENSOR].long()}), "torch.int64 where config.json says [40] torch.int32"),
        (lambda t: t.pop(TENSOR), "no shard holds the tensor next_tokens"),
    ],
)
def test_a_damaged_tensor_is_refused(stored, tmp_path, change, words):
    stored.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, str(tmp_path), words)


@pytest.mark.parametrize("value", [None, 1, "x", False], ids=str)
def test_a_manifest_that_says_otherwise_is_refused(stored, tmp_path, value):
    stored.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["memory"].update(next_tokens=value))
    refused(tmp_path, "next_tokens")


@pytest.mark.parametrize("as_older", [as_version_4, as_version_3, as_version_2])
def test_older_memories_have_the_next_tokens_that_their_text_says(memory, tmp_path, as_older):
    memory.save_pretrained(tmp_path)
    edit_config(tmp_path, as_older)
    loaded = RoutingMemory.from_pretrained(tmp_path, recall="both")
    assert_next(loaded, memory.next_tokens)


def test_an_older_verdict_is_of_the_routing_alone(memory, tmp_path):
    settings = {name: getattr(memory.config, name) for name in ("confidence", "gamma")}
    names = ("recall", "next_token_weight", "next_token_temperature", "next_token_neighbors")
    settings |= {name: getattr(memory.config, name) for name in names}
    replace(memory, verdict=verdict(settings=settings)).save_pretrained(tmp_path)
    edit_config(tmp_path, as_version_4)
    assert "recall" not in read_config(tmp_path)["memory"]["verdict"]["settings"]
    assert RoutingMemory.from_pretrained(tmp_path).verdict is not None
    assert RoutingMemory.from_pretrained(tmp_path, recall="both").verdict is None


@pytest.mark.parametrize("recall", ["routing", "both"])
def test_without_the_layer_that_recall_was_fitted_to_the_fit_is_left_out(memory, tmp_path, recall, caplog):
    replace(memory, calibration=calibration_record()).save_pretrained(tmp_path)
    whole, last, first = (
        RoutingMemory.from_pretrained(tmp_path, recall=recall, **options)
        for options in ({}, dict(layers=[1]), dict(layers=[0]))
    )
    assert (
        whole.calibration.fits and last.calibration.fits and first.calibration == replace(whole.calibration, fits={})
    )
    assert ("was fitted to layer 1, which layers=[0] leaves out" in caplog.text) == (recall == "both")


def test_options_of_next_tokens_that_routing_alone_ignores_are_named(stored, tmp_path, caplog):
    stored.save_pretrained(tmp_path)
    caplog.clear()
    RoutingMemory.from_pretrained(tmp_path, recall="both", next_token_weight=0.3)
    RoutingMemory.from_pretrained(tmp_path, next_token_weight=None)
    assert not caplog.records
    RoutingMemory.from_pretrained(tmp_path, next_token_weight=0.3, next_token_neighbors=5)
    assert warnings(caplog) == [
        "next_token_weight, next_token_neighbors: no effect with recall='routing'; use recall='next_tokens' or 'both'"
    ]
