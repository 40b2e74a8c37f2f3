"""The reference text around a memory's rows, as far as its provenance has it."""

from dataclasses import dataclass

from knnmoe_hf.memory import RoutingMemory

CONTEXT = 12
"""Tokens of a reference that are shown before a neighbour and after it."""


@dataclass(frozen=True)
class Reference:
    """
    Where a row comes from. What the memory does not know is None.

    Attributes:
        row: of the memory.
        example, position: the example, and the token's index in it.
        token_id, next_token_id: the token whose gate input is the key, and the one that follows it.
        before, token, after: the text of up to 12 tokens before it, its own, and that of up to 12 tokens after it.
    """

    row: int
    example: int | None = None
    position: int | None = None
    token_id: int | None = None
    next_token_id: int | None = None
    before: str | None = None
    token: str | None = None
    after: str | None = None


class ReferenceTexts:
    """
    The references of a memory's rows.

    Args:
        memory: with any provenance; text needs the token ids of the references, and a tokenizer.
        tokenizer: in place of the memory's own.
    """

    def __init__(self, memory: RoutingMemory, tokenizer=None):
        self.memory = memory
        self.tokenizer = tokenizer if tokenizer is not None else memory.tokenizer
        source = memory.provenance
        self._tokens = {} if source is None else source.tokens()

    def of(self, row: int) -> Reference:
        """What is known of a row."""
        source, following = self.memory.provenance, self.memory.next_tokens
        known = {} if following is None else {"next_token_id": int(following[row])}
        if source is None:
            return Reference(row, **known)
        example, position = int(source.example_ids[row]), int(source.positions[row])
        known |= {"example": example, "position": position if position >= 0 else None}
        ids = self._tokens.get(example)
        if ids is None or position < 0:
            return Reference(row, **known)
        known["token_id"] = int(ids[position])
        if self.tokenizer is not None:
            parts = (ids[max(position - CONTEXT, 0) : position], ids[position : position + 1])
            parts += (ids[position + 1 : position + 1 + CONTEXT],)
            known |= dict(zip(("before", "token", "after"), (self.text(part.tolist()) for part in parts)))
        return Reference(row, **known)

    def text(self, ids: list[int]) -> str | None:
        """Token ids as text, special tokens included; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def sentence(self) -> str:
        """What the memory knows of its references, and what it takes to know more."""
        source = self.memory.provenance
        if source is None:
            return "The memory does not know its references (provenance 'none'): rows, distances and weights remain."
        if not source.has_text:
            return (
                "The memory has no text of its references (provenance 'ids'): the example and the position of each "
                "neighbour remain."
            )
        if self.tokenizer is None:
            return "The memory has no tokenizer: the token ids of its references remain; pass tokenizer=."
        return "The text of the references is known."
