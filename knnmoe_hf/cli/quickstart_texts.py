"""The texts of a quickstart: references, held-out text, other text; and how the model goes on with one of them."""

import argparse
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from knnmoe_hf.cli.building import read_data
from knnmoe_hf.cli.comparing import Text
from knnmoe_hf.cli.data import default_test_split
from knnmoe_hf.cli.tables import IN_DOMAIN, OFF_DOMAIN
from knnmoe_hf.evaluation.references import References
from knnmoe_hf.models.attach import disable_memory, use_memory
from knnmoe_hf.models.offload import input_device


def texts_of(
    options: argparse.Namespace, tokenizer, vocab_size: int | None = None
) -> tuple[Sequence[dict], list[Text]]:
    """
    Reference examples, and test texts, none of which is a reference.

    Raises:
        ValueError: if a text cannot be read, or nothing is left of one.
    """
    other = options.test_dataset or options.test_split
    limits = dict(split=options.split, max_tokens=options.max_tokens, held_out=None if other else False)
    references = read_data(options, options.dataset, tokenizer, vocab_size, **limits)
    count, spare = options.test_examples, options.test_examples + len(references)
    if other:
        name = options.test_dataset or options.dataset
        split = options.test_split or default_test_split(name)
        rows = read_data(options, name, tokenizer, vocab_size, split=split, max_examples=spare)
    else:
        name = f"{options.dataset} (every fifth)"
        limits = dict(split=options.split, max_examples=count, held_out=True)
        rows = read_data(options, options.dataset, tokenizer, vocab_size, **limits)
    texts = [Text(name, IN_DOMAIN, rows)]
    if options.off_dataset:
        limits = dict(split=options.off_split, max_examples=spare)
        off = read_data(options, options.off_dataset, tokenizer, vocab_size, **limits)
        texts.append(Text(options.off_dataset, OFF_DOMAIN, off))
    known = References.of_rows(references)
    return references, [_left(options, known, text) for text in texts]


def _left(options: argparse.Namespace, references: References, text: Text) -> Text:
    """The first examples of a text that do not overlap the references."""
    rows = list(text.rows)
    if not options.allow_overlap:
        overlaps = references.overlapping(rows).tolist()
        rows = [row for row, seen in zip(rows, overlaps) if not seen]
    if not rows:
        raise ValueError(f"no example of {text.name} is left that is not a reference: name other held-out text.")
    return text._replace(rows=rows[: options.test_examples])


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer,
    rows: Sequence[dict],
    others: Sequence[str] = (),
    prompt: int = 32,
    new: int = 40,
) -> str:
    """How the model goes on with a held-out text: without and with the memory, and with those of other names."""
    ids = torch.tensor([rows[0]["input_ids"][:prompt]], device=input_device(model))
    call = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    with disable_memory(model):
        base = model.generate(ids, **call)
    texts = [("prompt", ids), ("base", base[:, prompt:]), ("memory", model.generate(ids, **call)[:, prompt:])]
    for name in others:
        with use_memory(model, name):
            texts.append((f"memory, recall {name}", model.generate(ids, **call)[:, prompt:]))
    return "\n".join(
        f"[{name}] {' '.join(tokenizer.decode(out[0], skip_special_tokens=True).split())}" for name, out in texts
    )
