"""What a model writes with a memory: repetition, variety, copying and likelihood of its continuations.

    python -m benchmarks.effect.generation                                # three labs, references of topics
    python -m benchmarks.effect.generation --labs gpt_oss --kinds headers

Held-out windows, of the domain and of other kinds, are continued after their first tokens: greedily, and by sampling
from the whole distribution with fixed seeds, by the frozen model and with each `recall` of one memory with the
library's defaults; the end-of-text token is not allowed, so that all continuations are of one length. The page sets
beside them how the windows themselves go on.

The NLL of a continuation is that under the largest lab model (OLMoE, 8.5 million parameters; twice the other two),
which for continuations in the domain was fine-tuned as a whole on windows of it that the memory does not hold. It is a
small model itself, and no judge of sense: read it beside the NLL of the windows' own continuations.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.effect.competitors import tuned
from benchmarks.effect.memories import Memories
from benchmarks.effect.settings import BOTH, DEFAULT, LABS, TOKENS
from benchmarks.pages import DTYPES, add_dtype, parser, provenance, shown_provenance, table, write
from benchmarks.texts import IN_DOMAIN, KINDS, REFERENCES, LabTexts
from knnmoe_hf import attach_memory, detach_memory
from knnmoe_hf.evaluation import Change
from knnmoe_hf.lab import LAB_MODELS

MODULE = "benchmarks.effect.generation"
BASE, ITSELF = "frozen model", "the windows themselves"
MODES = {"memory: routing": DEFAULT, "memory: next tokens": TOKENS, "memory: both": BOTH}
_SCORER, _SCORER_WINDOWS = "olmoe", 256
_COPIED = 8  # tokens
METRICS = {
    "repeated 4-grams, %": 1,
    "longest repeat, tokens": 1,
    "distinct 1-grams, %": 1,
    "distinct 2-grams, %": 1,
    "distinct 3-grams, %": 1,
    f"copied {_COPIED}-grams, %": 1,
    "NLL, nats per token": 3,
}
"""What is measured of each continuation, and the digits that are shown."""


class Prompts(NamedTuple):
    """(n, P) tokens, and how the same windows go on, (n, new)."""

    tokens: Tensor
    following: Tensor


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor, new: int, seed: int | None) -> Tensor:
    """(n, new) tokens after (n, P): the likeliest ones, or samples of the whole distribution with a seed."""
    how = dict(do_sample=False) if seed is None else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    if seed is not None:
        torch.manual_seed(seed)
    length = dict(max_new_tokens=new, min_new_tokens=new)
    mask = torch.ones_like(prompts)
    found = model.generate(prompts, attention_mask=mask, **length, **how, pad_token_id=model.config.pad_token_id or 0)
    return found[:, prompts.shape[1] :]


@torch.no_grad()
def nll(scorer: nn.Module, prompts: Tensor, following: Tensor) -> list[float]:
    """Mean NLL of each continuation (n, new) after its prompt (n, P), in nats per token."""
    logits = scorer(torch.cat([prompts, following], dim=1), use_cache=False).logits
    logits = logits[:, prompts.shape[1] - 1 : -1].float().transpose(1, 2)
    return F.cross_entropy(logits, following, reduction="none").mean(dim=1).tolist()


def grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All n-grams, in order."""
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def repeated(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that occurred before."""
    found = grams(tokens, n)
    return 1 - len(set(found)) / len(found)


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest n-gram that occurs twice, overlapping or not."""
    length = 0
    while length + 1 < len(tokens) and Counter(grams(tokens, length + 1)).most_common(1)[0][1] > 1:
        length += 1
    return length


def measured(following: Tensor, scored: list[float], held: set[tuple[int, ...]]) -> list[list[float]]:
    """The `METRICS` of each continuation; `held` are the n-grams of the references."""
    rows = []
    for tokens, of_scorer in zip(following.tolist(), scored):
        copied = [gram in held for gram in grams(tokens, _COPIED)]
        distinct = [100 * len(set(grams(tokens, n))) / len(grams(tokens, n)) for n in (1, 2, 3)]
        repeats = 100 * repeated(tokens), longest_repeat(tokens)
        rows.append([round(value, 4) for value in (*repeats, *distinct, 100 * sum(copied) / len(copied), of_scorer)])
    return rows


def change(base: Tensor, other: Tensor, resamples: int = 2000) -> Change:
    """Mean of `other - base` over prompts, (n,) each, with a 95 % interval of a bootstrap of whole prompts."""
    difference = (other - base).double()
    drawn = torch.randint(len(difference), (resamples, len(difference)), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = difference[drawn].mean(dim=1).quantile(bounds).tolist()
    return Change(difference.mean().item(), low, high, len(difference))


def prompts_of(texts: LabTexts, kind: str, options) -> dict[str, Prompts]:
    """In the domain, and as many of the other kinds together."""

    def cut(rows: list[dict]) -> Prompts:
        tokens = torch.tensor([row["input_ids"][: options.prompt + options.new] for row in rows])
        return Prompts(tokens[:, : options.prompt], tokens[:, options.prompt :])

    others = [kind_of for kind_of in KINDS if kind_of != kind]
    share = -(-options.prompts // len(others))
    off = [row for other in others for row in texts.test(other)[:share]]
    return {"in the domain": cut(texts.test(kind)), "off the domain": cut(off[: options.prompts])}


def scorers(texts: LabTexts, kind: str, options) -> dict[str, nn.Module]:
    """The model that scores continuations, by domain; see the docstring of this module."""
    frozen = _lab(_SCORER, options.dtype)
    own = texts.references(kind, options.seed, options.references + _SCORER_WINDOWS)[options.references :]
    own_scorer = _lab(_SCORER, options.dtype)
    trained = tuned("full fine-tuning", own_scorer, own, 0).method.state()
    own_scorer.load_state_dict(dict(trained), strict=False)  # weights that are tied are there once
    return {"in the domain": own_scorer, "off the domain": frozen}


def _lab(name: str, dtype: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[name], dtype=DTYPES[dtype])
    return model.requires_grad_(False).eval()


def generated(lab: str, kind: str, options) -> dict:
    """`{domain: {greedy or sampled: {mode: [[metrics] of each prompt]}}}`; samples are means over seeds."""
    model, tokenizer = _lab(lab, options.dtype), AutoTokenizer.from_pretrained(LAB_MODELS[lab])
    texts = LabTexts(tokenizer, options.prompts)
    references = texts.references(kind, options.seed, options.references)
    held = {gram for row in references for gram in grams(row["input_ids"], _COPIED)}
    kept = options.builds / f"{lab}-{kind}-{options.seed}" if options.builds is not None else None
    memories = Memories(model, tokenizer, references, options.seed, kept)
    made = {mode: memories.of(setting).memory for mode, setting in MODES.items()}
    judges, found = scorers(texts, kind, options), {}
    for domain, prompts in prompts_of(texts, kind, options).items():
        ways: dict[str, dict[str, list]] = {"greedy": {}, "sampled": {}}
        for mode in (BASE, *MODES):
            if mode != BASE:
                attach_memory(model, made[mode])
            try:
                for way, seeds in (("greedy", [None]), ("sampled", options.seeds)):
                    tables = []
                    for seed in seeds:
                        following = continued(model, prompts.tokens, options.new, seed)
                        scored = nll(judges[domain], prompts.tokens, following)
                        tables.append(measured(following, scored, held))
                    ways[way][mode] = torch.tensor(tables, dtype=torch.float64).mean(dim=0).tolist()
            finally:
                if mode != BASE:
                    detach_memory(model)
            print(lab, kind, domain, mode, flush=True)
        scored = nll(judges[domain], *prompts)
        for way in ways.values():
            way[ITSELF] = measured(prompts.following, scored, held)
        found[domain] = ways
    return found


def report(content: dict) -> str:
    """The page."""
    before, _, after = __doc__.partition("\n    python -m")
    about = before.rstrip("\n") + after.partition("headers")[2].rstrip("\n")
    columns = (
        f"*Repeated* 4-grams occurred before in the same continuation; *copied* {_COPIED}-grams stand in the "
        "references. Values are means over prompts (of samples, over seeds first); beneath those of a memory is the "
        "change against the frozen model with a 95 % interval of a bootstrap in which whole prompts are resampled."
    )
    parts = ["# What a model writes with a memory", shown_provenance(content["made"]), about, columns]
    for where, found in content["cells"].items():
        for domain, ways in found.items():
            for way, modes in ways.items():
                base, rows = torch.tensor(modes[BASE], dtype=torch.float64), []
                for mode, values in modes.items():
                    rows.append([mode, *_cells(base, torch.tensor(values, dtype=torch.float64), mode)])
                parts += [f"## {where}: {way}, {domain}, {len(base)} prompts", table(["", *METRICS], rows)]
    return "\n\n".join(parts)


def _cells(base: Tensor, values: Tensor, mode: str) -> list[str]:
    shown = []
    for column, digits in enumerate(METRICS.values()):
        mean = f"{values[:, column].mean():.{digits}f}"
        if mode in MODES:
            mean += f"<br>{change(base[:, column], values[:, column]).text(1, digits)}"
        shown.append(mean)
    return shown


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--labs", nargs="+", choices=list(LABS), default=list(LABS))
    add("--kinds", nargs="+", choices=IN_DOMAIN, default=["topics"])
    add("--prompts", type=int, default=32, help="in the domain, and as many off it; default 32")
    add("--prompt", type=int, default=64, help="tokens of a prompt; default 64")
    add("--new", type=int, default=96, help="tokens of a continuation; default 96")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the sampling; default 0 1 2")
    add("--seed", type=int, default=0, help="draws the references; default 0")
    add("--references", type=int, default=REFERENCES, help=f"windows of reference text; default {REFERENCES}")
    add("--builds", type=Path, help="keep the rows of builds in this folder, and use those that are there")
    add_dtype(options)
    options = options.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path = options.results / "generation.json"
    content = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    content["made"] = provenance(MODULE, argv)
    for lab in options.labs:
        for kind in options.kinds:
            content["cells"][f"{LABS[lab]}, {kind}"] = generated(lab, kind, options)
            write(options.results, "generation", content, report(content))


if __name__ == "__main__":
    main()
