"""Long text into windows of tokens, cut where the text itself has a border."""

import re
from collections.abc import Iterable, Iterator

BLOCK = 100_000  # characters that are tokenised at once: of a longer text no more is in memory, or read in vain

_SPLIT_CHARACTER, _HARD, _LINE, _PARAGRAPH = b"\0", b"\1", b"\2", b"\3"  # what is before a token, better is higher
_GAP = re.compile(r"\s+|[。！？]+")
_SENTENCE_ENDS = re.compile(r"""[.!?…。！？][)\]"'”’»]*\Z""")


def text_windows(text: str, tokenizer, max_length: int) -> list[list[int]]:
    """
    The token ids of a text in windows that a model can read one by one; no token is lost or in two windows.

    A window ends at the last blank line in its second half, else at the last end of a line or sentence there, else at
    the last whole character. The text is tokenised as a whole, so its tokens do not depend on the windows. A tokenizer
    that cannot say which characters a token is of (a slow one) gives full windows.

    Args:
        text: any text; longer ones than `BLOCK` are tokenised block by block.
        tokenizer: of transformers. Tokens that it puts around a text are put around each window, and count.
        max_length: tokens of a window at most.

    Returns:
        Windows in the order of the text; none of a text without tokens.

    Raises:
        ValueError: if `max_length` leaves no room beside the tokens that the tokenizer puts around a text.
    """
    before, after = _tokens_around(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"max_length={max_length} is not allowed: the tokenizer puts {len(before) + len(after)} tokens around "
            "each text, so use more."
        )
    shortest = max(1, 2 - len(before) - len(after))  # a window of one token has no target
    windows = []
    for block in blocks([text]):
        ids, borders = _tokens(block, tokenizer)
        ends = _ends(borders, room, shortest)
        windows += [before + ids[start:end] + after for start, end in zip([0, *ends], ends)]
    return windows


def blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """
    Joins the pieces of a text and cuts it at blank lines into blocks that can be tokenised one by one.

    Where the cuts are does not depend on the pieces. A block has `size` characters at most, the last one half of that
    more; blocks of white space alone are left out.
    """
    text = ""
    for chunk in chunks:
        text, start = text + chunk, 0
        while len(text) - start >= size + size // 2:
            end = _block_end(text, start, size)
            if not text[start:end].isspace():
                yield text[start:end]
            start = end
        text = text[start:]
    if text.strip():
        yield text


def _block_end(text: str, start: int, size: int) -> int:
    for border in ("\n\n", "\n", " "):
        if (found := text.rfind(border, start + size // 2, start + size)) >= 0:
            return found + len(border)
    return start + size


def _tokens_around(tokenizer) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after a text."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _tokens(text: str, tokenizer) -> tuple[list[int], bytes]:
    """The tokens of a text, and what border of the text is before each of them."""
    options = dict(add_special_tokens=False, verbose=False)
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, **options)["input_ids"])
        return ids, _HARD * len(ids)
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), _borders(text, encoded["offset_mapping"])


def _borders(text: str, offsets: list[tuple[int, int]]) -> bytes:
    """What border of the text is before each token, one byte a token."""
    borders = bytearray()
    gaps = _GAP.finditer(text)
    gap, last_end = next(gaps, None), 0
    for start, end in offsets:
        while gap is not None and gap.end() < start:
            gap = next(gaps, None)
        if start < last_end:
            borders += _SPLIT_CHARACTER
        elif gap is not None and gap.start() <= start:
            borders += _kind(text, gap)
        else:
            borders += _HARD
        last_end = max(last_end, end)
    return bytes(borders)


def _kind(text: str, gap: re.Match) -> bytes:
    lines = text.count("\n", gap.start(), gap.end())
    if lines > 1:
        return _PARAGRAPH
    at = gap.start() if gap.group()[0].isspace() else gap.end()
    return _LINE if lines or _SENTENCE_ENDS.search(text[max(at - 8, 0) : at]) else _HARD


def _ends(borders: bytes, room: int, shortest: int) -> list[int]:
    """Where windows of at most `room` tokens end; the last one has at least `shortest`, if that can be."""
    ends, start, count = [], 0, len(borders)
    while count - start > room:
        high = max(min(start + room, count - shortest), start + 1)
        low = min(start + (room + 1) // 2, high)
        found = (borders.rfind(kind, low, high + 1) for kind in (_PARAGRAPH, _LINE, _HARD))
        start = next((end for end in found if end >= 0), high)
        ends.append(start)
    return [*ends, count] if count else []
