"""What a saved memory tells of its references: no more than is asked for, and no less than it needs itself."""

from dataclasses import replace

from knnmoe_hf.errors import shown
from knnmoe_hf.memory.data import Memory, MemoryData
from knnmoe_hf.memory.next_tokens import next_tokens_of, why_unknown
from knnmoe_hf.memory.provenance import check_level


def at_level(memory: Memory, level: str | bool | None, next_tokens: bool | None = None) -> Memory:
    """
    The memory with no more provenance than `level`, one of `LEVELS`, and with next tokens as `save_pretrained` says.

    Raises:
        MemoryMismatchError: if its configuration does not describe it, see `MemoryData.check_config`.
        ValueError: for text or next tokens of a memory that has none, for neither of them where its own `recall` needs
            them, or a level that is not known.
    """
    memory.check_config()  # a copy would take the layers of the rows for those of the configuration
    kept, origin = memory.provenance, memory.origin
    level = check_level(level) if level is not None else None
    if next_tokens is not None and type(next_tokens) is not bool:
        raise ValueError(f"next_tokens={shown(next_tokens)} is not allowed: use True, False or None.")
    if level == "text" and len(memory) and not has_text(memory):
        raise ValueError(
            "provenance='text' is not possible: this memory has no text of its references, so use 'ids' or 'none', or "
            "build it anew."
        )
    if next_tokens and memory.next_tokens is None:
        raise ValueError(
            f"next_tokens=True is not possible: {why_unknown(kept)}; leave it out, or build the memory anew."
        )
    if level in ("ids", "none"):
        kept = kept.without_text() if kept and level == "ids" else None
        origin = replace(origin, reference_set_hash=None)  # a digest of the whole set would confirm a guessed text
    wanted = level in (None, "text") if next_tokens is None else next_tokens
    stored = memory.next_tokens if wanted and next_tokens_of(len(memory), kept, None) is None else None
    left = replace(memory, provenance=kept, origin=origin, stored_next_tokens=stored)
    recall = memory.config.recall
    if recall != "routing" and left.next_tokens is None:
        raise ValueError(
            f"recall={recall!r} of this memory needs its rows' next tokens, which would be left out: save it with "
            "next_tokens=True or provenance='text', or open it with recall='routing'."
        )
    return left


def has_text(memory: MemoryData) -> bool:
    """Whether the token ids of references are in it."""
    return memory.provenance is not None and memory.provenance.has_text


def tells_text(memory: MemoryData) -> bool:
    """Whether the text of references can be read from it: as token ids, or from the tokens that follow its rows."""
    return has_text(memory) or (memory.stored_next_tokens is not None and len(memory) > 0)
