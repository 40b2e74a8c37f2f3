"""What a memory tells of its references, and how to leave it out."""

from knnmoe_hf.errors import counted
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.levels import has_text, tells_text
from knnmoe_hf.memory.provenance import Provenance

_KEYS = """\
**Keys are hidden states of the references** (compressed inputs of the gates), one for each reference token and layer,
in the order of the text. They are not text, but whoever has the base model may recover text from them. They cannot be
left out: keep a memory to yourself if its references must not be known."""
_TEXT = """\
**The training text is inside**, as token ids, which the tokenizer turns back into text: {sizes}. Beside it are each
row's example, position and NLL, and a digest of the whole set. `provenance="ids"` or `"none"` in `save_pretrained`
leaves the text out."""
_NEXT_TOKENS = """\
**The training text can be read from it**: the token that follows each of the {rows} rows is inside, and in the order
of the rows these tokens are the text, which the tokenizer turns back into words. `recall="next_tokens"` and `"both"`
need them; `next_tokens=False` in `save_pretrained` leaves them out."""
_IDS_BESIDE = """\
Each row's example and position are inside too, and hashes of a quarter of the examples' runs of 8 tokens, by which
`evaluate` recognises a text that the memory holds."""
_ROWS_BESIDE = """\
The example of each row is inside too."""
_NOTHING_BESIDE = """\
What example a row came from is not inside, so it cannot be checked whether a test text is among the references."""
_IDS = """\
The training text is not inside, neither as text nor as token ids. Each row's example and position are, and hashes of a
quarter of the examples' runs of 8 tokens, by which `evaluate` recognises a text that the memory holds (and so can
anyone who guesses a run of 8 tokens). `provenance="none"` in `save_pretrained` leaves these out too."""
_ROWS = """\
The training text is not inside, neither as text nor as token ids; the example of each row is."""
_NOTHING = """\
The training text is not inside, neither as text nor as token ids, nor what example a row came from; so it cannot be
checked whether a test text is among the references."""
_WORDS = """\
Beside the rows, `config.json` and this card tell how many examples and tokens there were, the names that the maker
gave to the data, and the names of the kinds and files of background text that a calibration read."""


def inside(memory: MemoryData) -> str:
    """What is inside, and what of it can be left out."""
    return f"{_of_references(memory)}\n\n{_KEYS}\n\n{_WORDS}"


def reveals(memory: MemoryData) -> str:
    """The same in a sentence or two."""
    keys = "keys, which are hidden states from which text may be recovered"
    if has_text(memory):
        return f"**The text of its references is inside**, as token ids, beside {keys}."
    if tells_text(memory):
        return (
            f"**The text of its references can be read from it**, from the tokens that follow its rows, beside {keys}."
        )
    known = memory.provenance
    more = ", and hashes by which a guessed text is recognised" if known is not None and len(known.examples) else ""
    return f"Not the text of its references, but {keys}{more}."


def text_is_inside(memory: MemoryData, place: str) -> str:
    """What a save says that writes the text of the references to a folder or repository."""
    if has_text(memory):
        return (
            f"{place} holds the training text, as token ids: {_sizes(memory.provenance)}; to leave it out, save with "
            "provenance='ids' or 'none' (of a trainer: save_provenance)"
        )
    return (
        f"{place} holds the token that follows each of its {len(memory):,} rows, and in the order of the rows these "
        "tokens are the training text; to leave them out, save with next_tokens=False (of a trainer: without "
        "save_next_tokens)"
    )


def _of_references(memory: MemoryData) -> str:
    known = memory.provenance
    if has_text(memory):
        return _TEXT.format(sizes=_sizes(known))
    if known is None:
        alone, beside = _NOTHING, _NOTHING_BESIDE
    else:
        alone, beside = (_IDS, _IDS_BESIDE) if len(known.examples) else (_ROWS, _ROWS_BESIDE)
    return f"{_NEXT_TOKENS.format(rows=f'{len(memory):,}')} {beside}" if tells_text(memory) else alone


def _sizes(provenance: Provenance) -> str:
    return f"{counted(len(provenance.tokens()), 'example')}, {len(provenance.token_ids):,} tokens"
