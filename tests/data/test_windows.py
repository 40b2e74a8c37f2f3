"""Windows of a text: at its borders, without a token lost."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from knnmoe_hf.data.windows import blocks, text_windows
from tests.support.tokenizers import byte_tokenizer

WORDS = (
    "the gate routes a token to an expert. a key holds\n it, and\n\nvalues are mixed! \n \n drôle 三。四 \t\r\n".split(
        " "
    )
)


def some_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def bpe_tokenizer(around: str | None = None, trim: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, whose offsets leave out spaces by default, and with tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator([some_text(3000)], trainer)
    if around:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def texts_of(windows: list[list[int]], tokenizer=None) -> list[str]:
    return [bytes_of(ids, tokenizer or byte_tokenizer()).decode() for ids in windows]


def bytes_of(ids: list[int], tokenizer) -> bytes:
    bytes_by_symbol = {symbol: value for value, symbol in byte_symbols().items()}
    return bytes(bytes_by_symbol[symbol] for token in tokenizer.convert_ids_to_tokens(ids) for symbol in token)


def byte_symbols() -> dict[int, str]:
    """The symbols with which byte-level tokenizers write bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


@pytest.mark.parametrize(
    "text, length, expected",
    [
        ("one par.\n\nanother", 20, ["one par.\n\nanother"]),
        ("one par.\n\nanother", 14, ["one par.\n\n", "another"]),
        ("one par.\n \t\nanother one", 14, ["one par.\n \t\n", "another one"]),
        ("one par.\n\n\n\nanother", 14, ["one par.\n\n\n\n", "another"]),
        ("a\n\nb\n\nlonger paragraph", 16, ["a\n\nb\n\nlonger par", "agraph"]),  # both are in the first half
        ("a\n\nlong. parag\nraph and more", 16, ["a\n\nlong. parag\n", "raph and more"]),
        ("a\n\nlong one. paragraph", 16, ["a\n\nlong one. ", "paragraph"]),
        ('he said "stop it." paragraph', 20, ['he said "stop it." ', "paragraph"]),
        ("one two three four", 8, ["one two ", "three fo", "ur"]),
        ("三三。三三三", 12, ["三三。", "三三三"]),
        ("三三三三三三", 10, ["三三三", "三三三"]),  # no character is split
        ("12345678x", 8, ["1234567", "8x"]),  # a window of one token has no target
        ("", 8, []),
        ("x", 8, ["x"]),
    ],
)
def test_where_windows_end(text, length, expected):
    assert texts_of(text_windows(text, byte_tokenizer(), length)) == expected


@pytest.mark.parametrize("length", [2, 3, 7, 16, 61, 256, 10_000])
@pytest.mark.parametrize("trim", [True, False])
def test_no_token_is_lost_and_tokens_are_those_of_the_whole_text(length, trim):
    tokenizer = bpe_tokenizer(trim=trim)
    for seed in range(4):
        text = some_text(400, seed)
        windows = text_windows(text, tokenizer, length)
        whole = tokenizer(text)["input_ids"]
        assert [token for window in windows for token in window] == whole
        assert all(len(window) <= length for window in windows)
        assert length == 2 or all(len(window) >= min(2, len(whole)) for window in windows)
        assert all(2 * len(window) >= length - 1 for window in windows[:-1])


def test_windows_end_at_blank_lines_whatever_the_tokens_are():
    text = "\n\n".join(f"Paragraph {number} of some words, with a sentence. And another" for number in range(40))
    for tokenizer in (byte_tokenizer(), bpe_tokenizer(), bpe_tokenizer(trim=False)):
        tokens = len(tokenizer("\n\nParagraph 10 of some words, with a sentence. And another")["input_ids"])
        windows = text_windows(text, tokenizer, 3 * tokens)
        assert 13 <= len(windows) <= 20
        for window in texts_of(windows, tokenizer):
            assert window.strip().startswith("Paragraph") and window.strip().endswith("another")


@pytest.mark.parametrize("around, before, after", [("<s> $A", 1, 0), ("<s> $A </s>", 1, 1), ("$A </s>", 0, 1)])
def test_tokens_that_the_tokenizer_adds_are_on_each_window_and_count(around, before, after):
    tokenizer, text = bpe_tokenizer(around), some_text(200)
    windows = text_windows(text, tokenizer, 32)
    assert max(map(len, windows)) == 32 and min(map(len, windows)) >= 2
    inner = [window[before : len(window) - after] for window in windows]
    assert [token for window in inner for token in window] == tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert all(
        window[:before] == [first][:before] and window[len(window) - after :] == [last][:after] for window in windows
    )
    short = "a key"
    assert text_windows(short, tokenizer, 32) == [tokenizer(short)["input_ids"]]
    with pytest.raises(ValueError, match=f"max_length={before + after} is not allowed"):
        text_windows(text, tokenizer, before + after)


def test_a_tokenizer_without_offsets_gives_full_windows():
    class Slow:
        is_fast = False

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [ord(character) for character in text]}

    windows = text_windows("one par.\n\nanother", Slow(), 12)
    assert windows == [[ord(character) for character in part] for part in ("one par.\n\nan", "other")]


def test_a_tokenizer_that_changes_the_text():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "gate": 2, ".": 3}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert text_windows("THE GATE.\n\nThe gate the", fast, 4) == [[1, 2, 3], [1, 2, 1]]


def test_a_long_text_is_cut_into_blocks_that_do_not_depend_on_its_pieces():
    text = "".join(f"{number} is a line\n" + "\n" * (number % 5 == 0) for number in range(4000))
    whole = list(blocks([text], size=5000))
    assert "".join(whole) == text and all(len(block) <= 7500 for block in whole) and len(whole) > 10
    assert all(block.endswith("\n\n") for block in whole[:-1])
    for size in (1, 997, 20_000):
        assert list(blocks((text[i : i + size] for i in range(0, len(text), size)), size=5000)) == whole
    assert list(blocks([" \n" * 9000], size=5000)) == [] and list(blocks([], size=5)) == []
    assert "".join(blocks(["x" * 12_000], size=5000)) == "x" * 12_000


def test_a_text_of_several_blocks_loses_nothing():
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "x" * 400: 1, "y" * 400: 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = ("x" * 400 + "\n" + "y" * 400 + "\n\n") * 400
    assert len(list(blocks([text]))) == 3
    windows = text_windows(text, fast, 33)
    assert [token for window in windows for token in window] == [1, 2] * 400
    assert {len(window) for window in windows[:-1]} >= {32} and all(window[0] == 1 for window in windows)
    assert [window for block in blocks([text]) for window in text_windows(block, fast, 33)] == windows
