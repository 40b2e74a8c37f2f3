"""Single tokens as text that shows what they are: with their spaces, and as bytes where they are part of a letter."""

import re
import unicodedata
from typing import Literal, NamedTuple

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # of sentencepiece
_BROKEN = "�"


class Piece(NamedTuple):
    """
    A token as it is shown.

    Attributes:
        text: its characters; hexadecimal bytes such as `E2 82` if they are part of a letter; its name if special.
        kind: what `text` is; `"unknown"` where there is no tokenizer, and `text` is the token's id.
    """

    text: str
    kind: Literal["text", "bytes", "special", "unknown"]


class Pieces:
    """
    The tokens of a tokenizer as pieces of text.

    Args:
        tokenizer: of transformers, or None.
    """

    def __init__(self, tokenizer=None):
        self._tokenizer = tokenizer
        self._special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        self._bytes = _bytes_of_letters() if _is_of_bytes(tokenizer) else None

    def of(self, token_id: int) -> Piece:
        """A token as it is shown."""
        if self._tokenizer is None:
            return Piece(str(token_id), "unknown")
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:  # the model's vocabulary is larger than the tokenizer's
            return Piece(str(token_id), "unknown")
        if token_id in self._special:
            return Piece(name, "special")
        if found := _BYTE.fullmatch(name):
            return _of_bytes(bytes.fromhex(found[1]))
        if self._bytes is not None and all(letter in self._bytes for letter in name):
            return _of_bytes(bytes(self._bytes[letter] for letter in name))
        if _SPACE in name:
            return Piece(name.replace(_SPACE, " "), "text")
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return Piece(text if text and _BROKEN not in text else name, "text")


def shown(text: str) -> str:
    """A text with signs in place of characters that cannot be seen: `\\u200b`, but line ends and tabs stay."""
    return "".join(letter if _is_visible(letter) else f"\\u{ord(letter):04x}" for letter in text)


def _is_visible(letter: str) -> bool:
    return letter in "\n\t " or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _of_bytes(content: bytes) -> Piece:
    try:
        return Piece(content.decode("utf-8"), "text")
    except UnicodeDecodeError:
        return Piece(content.hex(" ").upper(), "bytes")


def _is_of_bytes(tokenizer) -> bool:
    """Whether a tokenizer's names of tokens are bytes, each written as a letter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in str(getattr(backend, "decoder", ""))


def _bytes_of_letters() -> dict[str, int]:
    """`{letter: byte}` of GPT-2's byte-level alphabet: printable bytes are themselves, others follow from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
