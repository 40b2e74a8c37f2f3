"""The model card of a saved memory, so that a repository says what it is and which model it belongs to."""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.levels import has_text, tells_text
from knnmoe_hf.memory.provenance import Provenance

_BODY = """---
{metadata}
---

# Routing memory for {base}

{verdict}
{rows} reference tokens of {examples}, for {layers} MoE layers of {base_class}; {megabytes:.1f} MB.
A routing memory adapts a frozen Mixture-of-Experts language model without touching a weight: each token looks up its
nearest reference tokens in every MoE layer and mixes their routing, optimised for the true next token, with the
gate's own.

```python
import knnmoe_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/memory")   # {base} with the memory attached
```

| | |
|---|---|
| value space | `{value_space}` |
| neighbours | {num_neighbors} |
| temperature, gamma | {temperature}, {gamma} |
| confidence | {confidence} |
| recall | {recall} |
| next tokens | {next_tokens} |
| calibrated against | {calibrated} |
| keys, values | {key_codec} {key_dtype}, {value_dtype} |

The weights of {base} are not part of this repository; its licence and limits hold for whatever the
two give.
{task}
## What is inside

{inside}
"""
_TASK = "\nIt was {sentence}. Prompts of an evaluation should be made likewise.\n"

_KEYS = """\
**Keys are hidden states of the references** (compressed inputs of the gates), one for each reference token and layer,
in the order of the text. They are not text, but whoever has the base model may recover text from them."""
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
anyone who guesses a run of 8 tokens)."""
_ROWS = """\
The training text is not inside, neither as text nor as token ids; the example of each row is."""
_NOTHING = """\
The training text is not inside, neither as text nor as token ids, nor what example a row came from; so it cannot be
checked whether a test text is among the references."""


def model_card(memory: MemoryData) -> str:
    """The card as Markdown with YAML metadata; the same memory always gives the same text."""
    name = memory.config.base_model_name_or_path
    on_hub = name is not None and not Path(name).exists() and _is_repository(name)
    data = ModelCardData(
        base_model=name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="knnmoe_hf",
        pipeline_tag="text-generation",
        tags=["knn-moe", "mixture-of-experts", "routing-memory"],
    )
    source = memory.provenance
    examples = f"{len(source.example_ids.unique())} examples" if source is not None else "examples that are not named"
    return _BODY.format(
        metadata=data.to_yaml(),
        base=name or "the model that it was built for",
        rows=f"{len(memory):,}",
        examples=examples,
        layers=len(memory.layers),
        base_class=memory.origin.base_model_class,
        megabytes=memory.nbytes / 1e6,
        calibrated=_calibrated(memory),
        verdict=_verdict(memory),
        recall=f"`{memory.config.recall}`",
        next_tokens=_next_tokens(memory),
        task=_TASK.format(sentence=memory.task_record.sentence()) if memory.task_record is not None else "",
        inside=f"{_inside(memory)}\n\n{_KEYS}",
        **{name: getattr(memory.config, name) for name in _SHOWN},
    )


def _verdict(memory: MemoryData) -> str:
    """The sentences of the verdict, one on each line of a list."""
    if memory.verdict is None:
        said = ["Whether this memory helps was not measured: compare it with `knnmoe evaluate` on text of your own."]
    else:
        said = memory.verdict.sentences()
    return "".join(f"- {sentence}\n" for sentence in said)


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


def _next_tokens(memory: MemoryData) -> str:
    """Whether `recall="next_tokens"` and `"both"` work, and what that takes."""
    if memory.next_tokens is None:
        return 'not inside, so `recall="next_tokens"` and `"both"` are not possible'
    if memory.stored_next_tokens is None:
        return 'read from the text of the references, for `recall="next_tokens"` and `"both"`'
    return f'inside, {memory.stored_next_tokens.nbytes / 1e6:.1f} MB, for `recall="next_tokens"` and `"both"`'


def _inside(memory: MemoryData) -> str:
    known = memory.provenance
    if has_text(memory):
        return _TEXT.format(sizes=_sizes(known))
    if known is None:
        alone, beside = _NOTHING, _NOTHING_BESIDE
    else:
        alone, beside = (_IDS, _IDS_BESIDE) if len(known.examples) else (_ROWS, _ROWS_BESIDE)
    return f"{_NEXT_TOKENS.format(rows=f'{len(memory):,}')} {beside}" if tells_text(memory) else alone


def _sizes(provenance: Provenance) -> str:
    examples = len(provenance.tokens())
    return f"{examples:,} example{'s' if examples != 1 else ''}, {len(provenance.token_ids):,} tokens"


def _calibrated(memory: MemoryData) -> str:
    """The kinds of background text that the calibration read, and whether they were given."""
    if memory.calibration is None:
        fitted = any(rows.stats is not None for rows in memory.layers.values())
        return "not recorded" if fitted else "nothing"
    if memory.calibration.threshold is None:
        return "nothing"
    kinds: dict[str, list[str]] = {source: [] for source in _SOURCES}
    for kind, text in sorted(memory.calibration.background.items()):
        kinds[text["source"]].append(f"`{kind}`")
    return "; ".join(f"{', '.join(kinds[source])} ({said})" for source, said in _SOURCES.items() if kinds[source])


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


_SOURCES = {"given": "given by its builder", "this machine": "found on the machine that built it"}
_SHOWN = (
    "value_space",
    "num_neighbors",
    "temperature",
    "gamma",
    "confidence",
    "key_codec",
    "key_dtype",
    "value_dtype",
)
