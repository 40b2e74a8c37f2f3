"""
The model card of a saved memory: what it is for, whether it helps, what it costs and what it reveals.

`template.md` is its text; `model_card` fills it in from a memory, whose `card_data` holds what its rows do not tell.
"""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from knnmoe_hf.errors import counted
from knnmoe_hf.memory.card import inside, measured, picture
from knnmoe_hf.memory.card.base_name import repository_of
from knnmoe_hf.memory.card.build import build
from knnmoe_hf.memory.card.inside import text_is_inside
from knnmoe_hf.memory.card.licenses import HUB_LICENSES
from knnmoe_hf.memory.card.words import code, escaped, listed, perplexity, size
from knnmoe_hf.memory.data import MemoryData
from knnmoe_hf.memory.measurements import one_line
from knnmoe_hf.memory.ownership import CARD, PICTURE

__all__ = ["model_card", "text_is_inside", "write_card"]

TEMPLATE = Path(__file__).with_name("template.md")
_MODEL = "Mixture-of-Experts model"
_TAGS = ["knn-moe", "mixture-of-experts", "routing-memory"]
_LOADING = """\
With the Python package `knnmoe_hf` installed:

```python
import knnmoe_hf  # before the model is loaded: it teaches transformers to open a memory
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{memory}")  # {base}, with the memory attached
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
```

In place of `{memory}` put the name of this repository (with `subfolder="..."` if the memory lies in a folder of
it), or a local folder. The weights of [{base}](https://huggingface.co/{base}) are loaded from their own repository.
"""
_LOADING_UNNAMED = """\
With the Python package `knnmoe_hf` installed:

```python
from knnmoe_hf import KNNMoEForCausalLM

model = KNNMoEForCausalLM.from_pretrained("the-base-model", memory="{memory}")
```

In place of `{memory}` put the name of this repository, or a local folder; in place of `the-base-model`, the
{kind} that it was built for.

**The base model is not named here**, as it was not loaded from the Hub: ask the maker of this memory. If that is you,
name its repository: `memory.push_to_hub("owner/name", model_card_kwargs={{"finetuned_from": "owner/base-model"}})`, or
`knnmoe push FOLDER owner/name --model owner/base-model`.
"""
_SWITCHING = """\
Inside of `with knnmoe_hf.disable_memory(model):` the model is the base model alone; `knnmoe_hf.detach_memory(model)`
takes the memory off it."""
_NOT_MEASURED = "Whether this memory helps was not measured."
_PICTURE_SHOWS = """\
Each mark is a group of about equally many tokens, of rising confidence: how far above 0 it lies is what the memory
gains on them. A good memory is confident on its references, and gains there; on other text it stays at the left, where
it can neither gain nor harm."""
_COST_NOT_MEASURED = "What it costs on other text was not measured."
_LIMITS = """\
- It belongs to one model: any other, also another checkpoint of the same architecture, is refused when it is attached.
  {name_says}
- What was measured is about text like its references. Other text of the same field may gain less, or nothing.
- It changes which experts a token is routed to{recall}. It teaches the model no new abilities, and the safety of what
  the model writes with it was not examined: the base model's limits and licence hold for whatever the two give.
- Each token looks up its neighbours among {rows} rows in {layers}, which takes time and {nbytes} of memory."""


def write_card(memory: MemoryData, folder: Path) -> None:
    """Writes the card, and its picture beside it if there is one."""
    (folder / CARD).write_text(model_card(memory), encoding="utf-8")
    drawn = picture.picture(memory)
    if drawn is not None:
        (folder / PICTURE).write_text(drawn, encoding="utf-8")


def model_card(memory: MemoryData) -> str:
    """The card as Markdown with YAML metadata; the same memory always gives the same text."""
    return ModelCard.from_template(metadata(memory), template_path=str(TEMPLATE), **_texts(memory)).content


def metadata(memory: MemoryData) -> ModelCardData:
    """The card's metadata as the Hub reads them."""
    said, base = memory.card_data, repository_of(memory)
    known = said.license is None or said.license.lower() in HUB_LICENSES
    licence = said.license.lower() if said.license is not None and known else None
    results = measured.results(memory)
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base is not None else None,
        library_name="knnmoe_hf",
        pipeline_tag="text-generation",
        tags=[*_TAGS, *said.tags],
        datasets=said.dataset_tags or None,
        language=said.language or None,
        license=licence if known else "other",
        license_name=None if known else _identifier(said.license),
        model_name=title(memory) if results else None,
        eval_results=results or None,
    )


def _identifier(license: str) -> str:
    """The name of a licence in the letters that the Hub takes for one."""
    return re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-") or "custom"


def title(memory: MemoryData) -> str:
    """What its maker calls it, or else what it is a memory of."""
    said = memory.card_data
    if said.model_name is not None:
        return said.model_name
    of = f": {', '.join(said.dataset)}" if said.dataset else ""
    return one_line(f"Routing memory for {repository_of(memory) or memory.origin.base_model_class or _MODEL}{of}")


def _texts(memory: MemoryData) -> dict[str, str]:
    """The parts of the template."""
    said, base = memory.card_data, repository_of(memory)
    verdict = _verdict(memory)
    whether, cost = verdict[:2] if len(verdict) > 1 else (_NOT_MEASURED, _COST_NOT_MEASURED)
    named = f"[{base}](https://huggingface.co/{base})" if base else f"{_kind(memory)} whose name is not recorded"
    shown = f"\n\n![{picture.ALT}]({PICTURE})\n\n{_PICTURE_SHOWS}\n" if picture.picture(memory) is not None else ""
    return {
        "title": escaped(title(memory)),
        "summary": f"A routing memory for {named}: it adapts this frozen model to {_domain(memory)}.",
        "purpose": _purpose(memory),
        "helps": f"{whether}{_perplexities(memory)}",
        "costs": f"{size(memory.nbytes)} of keys and values, which are searched for each token. {cost}",
        "reveals": f"{inside.reveals(memory)} How to leave it out is [below](#what-is-inside-and-what-it-reveals).",
        "licence": code(said.license) if said.license else "not stated",
        "rows": _rows(memory),
        "model": "" if base else " --model the-base-model",
        "loading": f"{_loading(memory, base)}\n{_SWITCHING}",
        "verdict": "".join(f"- {sentence}\n" for sentence in verdict),
        "evaluation": f"{measured.evaluation(memory)}{shown}",
        "layers": measured.layers(memory),
        "inside": inside.inside(memory),
        "build": build(memory),
        "limits": _limits(memory, base),
    }


def _verdict(memory: MemoryData) -> list[str]:
    """Its sentences, as they are read elsewhere; where there is no verdict, that there is none."""
    if memory.verdict is None:
        return [_NOT_MEASURED]
    return [escaped(sentence) for sentence in memory.verdict.sentences()]


def _kind(memory: MemoryData) -> str:
    return f"a model of class {_class(memory)}"


def _class(memory: MemoryData) -> str:
    return code(memory.origin.base_model_class or _MODEL)


def _domain(memory: MemoryData) -> str:
    said = memory.card_data
    return f"text like that of {listed(said.dataset)}" if said.dataset else "text like its references"


def _purpose(memory: MemoryData) -> str:
    said, source = memory.card_data, memory.provenance
    of = f" of {listed(said.dataset)}" if said.dataset else ", which its maker has not named"
    tags = [f"[{tag}](https://huggingface.co/datasets/{tag})" for tag in said.dataset_tags if tag not in said.dataset]
    of += f" ({', '.join(tags)})" if tags else ""
    count = f"{counted(len(source.example_ids.unique()), 'example')}, " if source is not None else ""
    language = f" Language: {', '.join(said.language)}." if said.language else ""
    known = f"Text like its references: {count}{len(memory):,} tokens{of}.{language}"
    if memory.task_record is None:
        return known
    return (
        f"{known} It was {escaped(memory.task_record.sentence())}. Prompts of an evaluation should be made likewise."
    )


def _perplexities(memory: MemoryData) -> str:
    for _, kind, base, of in measured.texts(memory):
        if kind == "references" and base is not None:
            return f" Perplexity there: {perplexity(base)} without the memory, {perplexity(base + of.mean)} with it."
    return ""


def _rows(memory: MemoryData) -> str:
    source = memory.provenance
    examples = f"{len(source.example_ids.unique())} examples" if source is not None else "examples that are not named"
    layers = f"{counted(len(memory.layers), 'MoE layer')} of {_class(memory)}"
    return f"{len(memory):,} reference tokens of {examples}, for {layers}; {memory.nbytes / 1e6:.1f} MB."


def _loading(memory: MemoryData, base: str | None) -> str:
    place = "owner/name-of-this-memory"
    if base is None:
        return _LOADING_UNNAMED.format(memory=place, kind=_class(memory))
    return _LOADING.format(memory=place, base=base, tokenizer=base if memory.tokenizer is None else place)


def _limits(memory: MemoryData, base: str | None) -> str:
    name_says = f"It was built for `{base}`." if base else "Which one that is was not recorded."
    recall = "" if memory.config.recall == "routing" else ", and which next tokens are likely"
    layers = counted(len(memory.layers), "layer")
    numbers = dict(rows=f"{len(memory):,}", layers=layers, nbytes=size(memory.nbytes))
    return _LIMITS.format(name_says=name_says, recall=recall, **numbers)
