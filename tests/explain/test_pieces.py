"""Tokens as text: byte-level and sentencepiece-like vocabularies, special tokens, parts of letters."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from knnmoe_hf.explain.pieces import Piece, Pieces, shown
from knnmoe_hf.lab import LAB_MODELS


@pytest.fixture(scope="module")
def byte_level():
    return AutoTokenizer.from_pretrained(str(LAB_MODELS["olmoe"]))


@pytest.fixture(scope="module")
def sentencepiece():
    vocabulary = {"<s>": 0, "▁the": 1, "▁": 2, "gate": 3, "<0xE2>": 4, "<0x41>": 5, "s": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.mark.parametrize(
    "text", ["a gate\n\troutes", "  two spaces", "naïve café", "שלום", "🙂 漢字", "\x00\x7f\u200b"]
)
def test_the_pieces_of_a_text_are_the_text(byte_level, text):
    found = [Pieces(byte_level).of(id) for id in byte_level(text, add_special_tokens=False).input_ids]
    parts = [bytes.fromhex(piece.text) if piece.kind == "bytes" else piece.text.encode() for piece in found]
    assert b"".join(parts).decode() == text


def test_sentencepiece_has_spaces_bytes_and_special_tokens(sentencepiece):
    found = [Pieces(sentencepiece).of(id) for id in range(7)]
    assert found == [
        Piece("<s>", "special"),
        Piece(" the", "text"),
        Piece(" ", "text"),
        Piece("gate", "text"),
        Piece("E2", "bytes"),
        Piece("A", "text"),
        Piece("s", "text"),
    ]


def test_ids_without_a_token_are_shown_as_ids(byte_level):
    assert Pieces(byte_level).of(10**6) == Piece("1000000", "unknown")
    assert Pieces().of(5) == Piece("5", "unknown")


def test_what_cannot_be_seen_is_named():
    assert shown("a\u202eb\x07\n\t ") == "a\\u202eb\\u0007\n\t "
